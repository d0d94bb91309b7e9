// The first page: how far the run is, what it reached, and what it said besides.

function overviewSection() {
  const steps = lastOf(RUN.metrics.steps) || 0;
  const seconds = metric("time/step");
  const pace = meanOf(seconds, 0, seconds.length);
  const [first, last] = ends("reward/mean");
  const accuracy = accuracyOf("mean");
  const tiles = [
    tile("Status", RUN.status, `step ${steps} of ${RUN.planned}`),
    tile("Mean reward", `${fixed(first)} → ${fixed(last)}`, `first and last ${count(summaryWindow(), "step")}`),
    tile("Held-out accuracy", `${fixed(accuracy[0])} → ${fixed(lastOf(accuracy))}`, "first and last evaluation"),
    tile("Time", pace === null ? "-" : duration(pace * RUN.metrics.total), pace === null ? "" : `${duration(pace)} per step on average`),
  ];
  return el(
    "div",
    {},
    RUN.warning ? el("p", { class: "warning", role: "alert" }, RUN.warning) : null,
    el("div", { class: "tiles" }, tiles),
    RUN.metrics.total ? overviewTable() : absent("No training step is on file yet."),
    RUN.metrics.total > RUN.metrics.steps.length
      ? el("p", { class: "remark" }, `Curves show ${RUN.metrics.steps.length} of ${RUN.metrics.total.toLocaleString("en")} steps: ` +
          "the first, the last and some evenly between. Everything is in metrics.jsonl.")
      : null,
    sampledRemark(RUN.rollouts.steps.length, RUN.rollouts.num_steps, "rollouts"),
    RUN.rollouts.unreadable.length
      ? el("p", { class: "remark" }, `The rollouts of these steps could not be read: ${RUN.rollouts.unreadable.join(", ")}.`)
      : null,
    el("h2", {}, "Notes"),
    notesList(),
  );
}

function count(number, what) {
  return `${number} ${what}${number === 1 ? "" : "s"}`;
}

function tile(name, value, about) {
  return el("div", { class: "tile" }, el("span", { class: "about" }, name), el("strong", {}, value), el("span", { class: "about" }, about));
}

/** Reward and held-out accuracy by domain, and their mean. */
function overviewTable() {
  const evaluated = RUN.evaluations.total > 0;
  const rows = [...RUN.domains, "mean"].map((name, domain) => {
    const [first, last] = ends(`reward/${name}`);
    const accuracy = accuracyOf(name);
    const cells = [first, last, difference(first, last)];
    if (evaluated) cells.push(accuracy[0], lastOf(accuracy), difference(accuracy[0], lastOf(accuracy)));
    const label = domain < RUN.domains.length ? domainTag(domain) : el("strong", {}, name);
    return [label, ...cells.map((cell, i) => (i % 3 === 2 ? signed(cell) : fixed(cell)))];
  });
  const span = count(summaryWindow(), "step");
  const headings = ["domain", `reward, first ${span}`, `reward, last ${span}`, "change"];
  if (evaluated) headings.push("held-out, first", "held-out, last", "change");
  return table(headings, rows);
}

function difference(before, after) {
  return Number.isFinite(before) && Number.isFinite(after) && before !== null && after !== null ? after - before : null;
}

function fixed(value) {
  return value === null || value === undefined ? "-" : value.toFixed(3);
}

function signed(value) {
  if (value === null) return "-";
  return el("span", { class: value > 0.0005 ? "up" : value < -0.0005 ? "down" : null }, (value < 0 ? "" : "+") + value.toFixed(3));
}

function notesList() {
  const { notes, total, first } = RUN.notes;
  if (!total) return absent("The run has said nothing yet.");
  const items = notes.map((note) =>
    el("li", { class: note.text.startsWith("WARNING") ? "warning" : null }, el("span", { class: "when" }, `step ${note.step}`), note.text),
  );
  if (notes.length < total) {
    items.splice(first, 0, el("li", { class: "remark" }, `${total - notes.length} notes are left out here; notes.jsonl has them.`));
  }
  return el("ul", { class: "notes" }, items);
}
