// The browser of rollouts: filters, a list in pages, and the one that is open, with its partners.

const PAGE_ROWS = 50;
const SEARCH_MILLISECONDS = 150;
const BROWSER = { step: "", domain: "", outcome: "", anchors: false, text: "", page: 0, open: null };

function rolloutHash(step, place) {
  return `#rollouts/${step}/${place}`;
}

function openRollout(step, place) {
  location.hash = rolloutHash(step, place);
}

/** Go to the list of one step's rollouts. */
function showStep(step) {
  Object.assign(BROWSER, { step: STEPS.has(step) ? String(step) : "", domain: "", outcome: "", anchors: false, text: "", page: 0 });
  location.hash = "#rollouts";
  document.dispatchEvent(new Event("filterchange"));
}

function rolloutsSection() {
  if (!STEPS.size) return absent("No rollouts are on file yet.");
  const list = el("div", { class: "list" });
  const detail = el("article", { class: "detail", tabindex: "-1", "aria-live": "polite" });
  const filters = el("form", { class: "controls", submit: (event) => event.preventDefault() });
  const refill = () => {
    filters.replaceChildren(...rolloutFilters(refresh));
    refresh();
  };
  const refresh = () => list.replaceChildren(...rolloutList(refresh));
  document.addEventListener("filterchange", refill);
  refill();
  return Object.assign(
    el("div", {}, filters, sampledRemark(STEPS.size, RUN.rollouts.num_steps, "rollouts"), el("div", { class: "browser" }, list, detail)),
    { route: (parts) => openRoute(parts, detail, list) },
  );
}

function rolloutFilters(refresh) {
  const set = (name, read) => (event) => {
    BROWSER[name] = read(event.target);
    BROWSER.page = 0;
    refresh();
  };
  const choice = (name, label, options) =>
    el(
      "label",
      {},
      `${label} `,
      el("select", { name, change: set(name, (node) => node.value) }, options.map(([value, text]) => el("option", { value, selected: value === BROWSER[name] }, text))),
    );
  let timer = null;
  const search = set("text", (node) => node.value.toLowerCase());
  const later = (event) => {
    clearTimeout(timer);
    timer = setTimeout(() => search(event), SEARCH_MILLISECONDS);
  };
  return [
    choice("step", "Step", [["", "all"], ...[...STEPS.keys()].map((step) => [String(step), String(step)])]),
    choice("domain", "Domain", [["", "all"], ...RUN.domains.map((name, domain) => [String(domain), name])]),
    choice("outcome", "Outcome", [["", "all"], ["right", "right"], ["wrong", "wrong"]]),
    el("label", {}, el("input", { type: "checkbox", name: "anchors", checked: BROWSER.anchors, change: set("anchors", (node) => node.checked) }), " anchors only"),
    el("label", {}, "Text ", el("input", { type: "search", name: "text", value: BROWSER.text, input: later, placeholder: "in prompt or completion" })),
  ];
}

function matches(entry, rollout) {
  const group = entry.groups[rollout.group];
  if (BROWSER.domain !== "" && group.domain !== Number(BROWSER.domain)) return false;
  if (BROWSER.outcome !== "" && rollout.right !== (BROWSER.outcome === "right")) return false;
  if (BROWSER.anchors && !rollout.partners.some((number) => number > 0)) return false;
  return !BROWSER.text || rollout.text.toLowerCase().includes(BROWSER.text) || group.prompt.toLowerCase().includes(BROWSER.text);
}

function filtered() {
  const found = [];
  for (const [step, entry] of STEPS) {
    if (BROWSER.step !== "" && step !== Number(BROWSER.step)) continue;
    for (const rollout of entry.rollouts) if (matches(entry, rollout)) found.push([entry, rollout]);
  }
  return found;
}

function rolloutList(refresh) {
  const found = filtered();
  const pages = Math.max(1, Math.ceil(found.length / PAGE_ROWS));
  BROWSER.page = Math.min(BROWSER.page, pages - 1);
  const turn = (by) => () => {
    BROWSER.page += by;
    refresh();
  };
  const right = found.filter(([, rollout]) => rollout.right).length;
  const from = BROWSER.page * PAGE_ROWS;
  const summary = found.length ? `${found.length.toLocaleString("en")} rollouts, ${percent(right / found.length)} right` : "No rollout fits these filters.";
  const turning = [
    el("button", { type: "button", disabled: BROWSER.page === 0, click: turn(-1) }, "Previous"),
    el("span", {}, `${BROWSER.page + 1} / ${pages}`),
    el("button", { type: "button", disabled: BROWSER.page === pages - 1, click: turn(1) }, "Next"),
  ];
  return [
    el("p", { class: "summary", role: "status" }, summary),
    el("ol", { class: "rows" }, found.slice(from, from + PAGE_ROWS).map(([entry, rollout]) => el("li", {}, rolloutLink(entry, rollout)))),
    el("div", { class: "turning" }, pages > 1 ? turning : []),
  ];
}

function rolloutLink(entry, rollout) {
  const hash = rolloutHash(entry.step, rollout.place);
  return el(
    "a",
    { href: hash, class: rollout.right ? "row right" : "row wrong", "aria-current": hash === BROWSER.open ? "true" : null },
    el("span", { class: "when" }, `step ${entry.step}`),
    outcomeTag(rollout),
    domainTag(entry.groups[rollout.group].domain),
    el("span", { class: "snippet" }, snippet(rollout.text)),
  );
}

function outcomeTag(rollout) {
  return el("span", { class: "outcome" }, rollout.right ? "✓ right" : "✗ wrong");
}

/** Show what the address names: ["rollouts", step, place]. */
function openRoute(parts, detail, list) {
  const found = parts.length === 3 ? findRollout(Number(parts[1]), Number(parts[2])) : null;
  BROWSER.open = found ? rolloutHash(found.entry.step, found.rollout.place) : null;
  for (const link of list.querySelectorAll("a.row")) {
    if (link.getAttribute("href") === BROWSER.open) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  }
  if (found) {
    detail.replaceChildren(...rolloutDetail(found.entry, found.rollout));
    detail.focus({ preventScroll: true });
    // On a narrow page it lies above the list.
    if (matchMedia("(max-width: 860px)").matches) detail.scrollIntoView();
  } else {
    detail.replaceChildren(absent(parts.length > 1 ? "This file does not have that rollout." : "Choose a rollout to see it with its positives and negatives."));
  }
}

function rolloutDetail(entry, rollout) {
  const group = entry.groups[rollout.group];
  const facts = [
    ["reward", shown(rollout.reward)],
    ["advantage", shown(rollout.advantage)],
    ["ended by", rollout.stop],
    ["item", group.item],
  ];
  return [
    el("h3", {}, `Step ${entry.step} `, outcomeTag(rollout), " ", domainTag(group.domain)),
    el("dl", { class: "facts" }, facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)))),
    el("h4", {}, "Prompt"),
    textBlock(group.prompt, group.cut),
    el("h4", {}, "Completion"),
    textBlock(rollout.text, rollout.cut),
    el("h4", {}, "Expected answer"),
    textBlock(group.answer, 0),
    pairsView(entry, rollout),
    el("h4", {}, "Other rollouts of this prompt"),
    siblings(entry, rollout),
  ].flat();
}

function textBlock(text, cut) {
  return [
    el("pre", { tabindex: text.length > 1500 ? "0" : null }, text || "(empty)"),
    cut ? el("p", { class: "remark" }, `${cut.toLocaleString("en")} characters are left out here; rollouts/ has the whole text.`) : null,
  ].filter(Boolean);
}

function siblings(entry, rollout) {
  const others = entry.rollouts.filter((other) => other.group === rollout.group && other !== rollout);
  if (!others.length) return absent("None is in this file.");
  return el("ul", { class: "partners" }, others.map((other) =>
    el("li", {}, el("a", { href: rolloutHash(entry.step, other.place), class: other.right ? "partner right" : "partner wrong" }, outcomeTag(other), el("span", { class: "snippet" }, snippet(other.text)))),
  ));
}
