// What domains have to do with each other: similarity, positives and negatives by pairs of domains, step by step.

const PAIR_FIGURES = [
  { key: "contrast/similarity", name: "Similarity of correct rollouts", about: "Mean cosine; on the diagonal, of two different rollouts of the domain", symmetric: true },
  { key: "contrast/positives", name: "Positives of an anchor", about: "Row: the anchor's domain; column: that of its positives" },
  { key: "contrast/negatives", name: "Negatives of an anchor", about: "Row: the anchor's domain; column: that of its negatives" },
];

function matrixSection() {
  if (!RUN.contrastive) return absent(WITHOUT_CONTRAST);
  const kinds = PAIR_FIGURES.map((kind) => ({ ...kind, places: placesOf(kind) })).filter((kind) => kind.places.length);
  if (!kinds.length) return absent("No step has metrics of pairs of domains yet.");
  const body = el("div", {});
  const open = (kind) => body.replaceChildren(matrixOf(kind));
  const pick = el("select", { change: (event) => open(kinds[Number(event.target.value)]) }, kinds.map((kind, i) => el("option", { value: i }, kind.name)));
  open(kinds[0]);
  return el("div", {}, el("div", { class: "controls" }, el("label", {}, "Show ", pick)), body);
}

function pairColumn(kind, a, b) {
  const [first, second] = kind.symmetric && a > b ? [b, a] : [a, b];
  return metric(`${kind.key}/${RUN.domains[first]}/${RUN.domains[second]}`);
}

/** Positions of the steps that have a value for some pair. */
function placesOf(kind) {
  const known = RUN.domains.flatMap((_, a) => RUN.domains.map((__, b) => pairColumn(kind, a, b)));
  return RUN.metrics.steps.map((_, i) => i).filter((i) => known.some((values) => values[i] !== null));
}

function matrixOf(kind) {
  const pairs = RUN.domains.map((_, a) => RUN.domains.map((__, b) => pairColumn(kind, a, b)));
  const most = (extent(pairs.flat()) || [0, 1])[1];
  const chart = el("div", { class: "charts" });
  const track = (a, b) => {
    const names = `${RUN.domains[a]} / ${RUN.domains[b]}`;
    const series = [{ name: names, ...domainStyle(a), values: pairs[a][b] }];
    chart.replaceChildren(lineChart({ title: names, about: kind.name, steps: RUN.metrics.steps, series }));
  };
  const cells = pairs.map((row, a) => row.map((_, b) => el("button", { type: "button", class: "cell", click: () => track(a, b) })));
  const show = (place) => {
    cells.forEach((row, a) => row.forEach((cell, b) => paint(cell, pairs[a][b][kind.places[place]], kind, most, a, b)));
  };
  const slider = stepSlider({
    label: "Step of the matrix", steps: kind.places.map((i) => RUN.metrics.steps[i]), start: kind.places.length - 1, change: show,
  });
  const grid = table(["", ...RUN.domains], cells.map((row, a) => [domainTag(a), ...row]));
  grid.classList.add("matrix");
  const about = el("p", { class: "about" }, `${kind.about}. A click on a cell shows its course.`);
  track(0, RUN.domains.length > 1 ? 1 : 0);
  return el("div", {}, about, slider.node, el("div", { class: "beside" }, grid, chart));
}

function paint(cell, value, kind, most, a, b) {
  const known = value !== null && value !== undefined;
  cell.textContent = known ? (kind.symmetric ? value.toFixed(2).replace(/^-(0\.00)$/, "$1") : shown(value)) : "-";
  cell.setAttribute("aria-label", `${RUN.domains[a]} and ${RUN.domains[b]}: ${cell.textContent}; show its course`);
  const strength = known ? Math.min(1, Math.abs(kind.symmetric ? value : value / (most || 1))) : 0;
  const [red, green, blue] = known && value < 0 ? [42, 127, 193] : [213, 94, 0];
  cell.style.background = `rgba(${red}, ${green}, ${blue}, ${(0.85 * strength).toFixed(3)})`;
}
