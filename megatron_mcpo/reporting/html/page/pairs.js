// Who is whose partner. Lists of positives are dumped; all else follows from classes (see rollout_sample.py): an anchor's
// negatives are the wrong rollouts of its class "against", its consolidation's positives the right ones of its class "with".

/** Step -> its entry, whose `byPlace` finds a rollout by its place in the step's file. */
const STEPS = new Map(
  RUN.rollouts.steps.map((entry) => [entry.step, { ...entry, byPlace: new Map(entry.rollouts.map((rollout) => [rollout.place, rollout])) }]),
);

/** The rollout and its step's entry; null where this file does not have it. */
function findRollout(step, place) {
  const entry = STEPS.get(step);
  const rollout = entry && entry.byPlace.get(place);
  return rollout ? { entry, rollout } : null;
}

/** The kinds of partners of a rollout: [{ title, about, total, found }]; found: those that are in this file. */
function partnersOf(entry, rollout) {
  return rollout.right ? partnersOfAnchor(entry, rollout) : [
    {
      title: "It is a negative of",
      about: "anchors are pushed from it",
      total: null,
      found: entry.rollouts.filter((other) => other.right && other.partners[2] > 0 && other.against === rollout.against),
    },
  ];
}

function partnersOfAnchor(entry, rollout) {
  const [positives, consolidated, negatives] = rollout.partners;
  const kinds = [
    {
      title: "Positives of other domains",
      about: "knowledge sharing pulls it to them",
      total: positives,
      found: rollout.positives.map((place) => entry.byPlace.get(place)).filter(Boolean),
    },
    {
      title: RUN.in_domain_scope === "prompt" ? "Positives of its prompt" : "Positives of its domain",
      about: "consolidation pulls it to them",
      total: consolidated,
      found: consolidated ? entry.rollouts.filter((other) => other.right && other !== rollout && other.with === rollout.with) : [],
    },
    {
      title: { pool: "Negatives", domain: "Negatives of its domain", prompt: "Negatives of its prompt" }[RUN.negatives],
      about: "incorrect rollouts that it is pushed from",
      total: negatives,
      found: negatives ? entry.rollouts.filter((other) => !other.right && other.against === rollout.against) : [],
    },
    {
      title: "It is a positive of",
      about: "anchors of other domains that are pulled to it",
      total: null,
      found: entry.rollouts.filter((other) => other.positives.includes(rollout.place)),
    },
  ];
  return kinds.filter((kind) => kind.total !== 0 && (kind.total !== null || kind.found.length));
}

const PARTNERS_SHOWN = 24;

/** A rollout's partners as lists of links. */
function pairsView(entry, rollout) {
  if (!RUN.contrastive) return absent(WITHOUT_CONTRAST);
  const kinds = partnersOf(entry, rollout).filter((kind) => kind.total || kind.found.length);
  if (!kinds.length) return absent(rollout.right ? "It is no anchor: it has no positives, or there is no negative." : "No anchor of this file is pushed from it.");
  return el("div", { class: "pairs" }, kinds.map((kind) => partnerList(entry, kind)));
}

function partnerList(entry, { title, about, total, found }) {
  const link = (other) =>
    el(
      "li",
      {},
      el(
        "a",
        { href: rolloutHash(entry.step, other.place), class: other.right ? "partner right" : "partner wrong" },
        domainTag(entry.groups[other.group].domain),
        el("span", { class: "snippet" }, snippet(other.text)),
      ),
    );
  const list = el("ul", { class: "partners" }, found.slice(0, PARTNERS_SHOWN).map(link));
  const more = el(
    "button",
    {
      type: "button",
      click: () => {
        list.append(...found.slice(PARTNERS_SHOWN).map(link));
        more.remove();
      },
    },
    `Show all ${found.length}`,
  );
  const number = total === null ? `${found.length} in this file` : found.length < total ? `${total}, ${found.length} of them in this file` : String(total);
  return el(
    "section",
    {},
    el("h4", {}, `${title} `, el("span", { class: "about" }, `${number}; ${about}`)),
    list,
    found.length > PARTNERS_SHOWN ? more : null,
  );
}

/** The beginning of a text on one line. */
function snippet(text) {
  const line = text.replace(/\s+/g, " ").trim();
  return line ? (line.length > 110 ? `${line.slice(0, 110)}…` : line) : "(empty)";
}
