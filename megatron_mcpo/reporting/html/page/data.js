// The run's data, and what several sections ask of it.

const RUN = JSON.parse(document.getElementById("data").textContent);

// Okabe and Ito's colours (https://jfly.uni-koeln.de/color/); after seven domains they come again, dashed.
const COLOURS = ["#2a7fc1", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a8a8a"];
const DASHES = [null, "6 3", "2 3", "9 3 2 3", "4 2 1 2"];

function domainStyle(domain) {
  return {
    colour: COLOURS[domain % COLOURS.length],
    dash: DASHES[Math.floor(domain / COLOURS.length) % DASHES.length],
  };
}

/** The name of a domain, behind a mark in its colour. */
function domainTag(domain) {
  const mark = el("span", { class: "mark", "aria-hidden": "true" });
  mark.style.background = domainStyle(domain).colour;
  return el("span", { class: "domain" }, mark, RUN.domains[domain]);
}

/** A column of the metrics; nulls where there is none. */
function metric(name) {
  return RUN.metrics.columns[name] || RUN.metrics.steps.map(() => null);
}

function hasMetric(name) {
  return (RUN.metrics.columns[name] || []).some((value) => value !== null);
}

/** Held-out accuracy of a domain, or "mean", by evaluation; nulls where there is none. */
function accuracyOf(name) {
  return RUN.evaluations.columns[name] || RUN.evaluations.steps.map(() => null);
}

/** Mean of what is known of values[from, to); null without any. */
function meanOf(values, from, to) {
  const known = values.slice(Math.max(0, from), to).filter((value) => value !== null);
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
}

function lastOf(values) {
  return values.length ? values[values.length - 1] : null;
}

/** How many steps the beginning and the end of the run are: as in the table that the run printed. */
function summaryWindow() {
  return Math.min(RUN.window, Math.max(1, Math.floor(RUN.metrics.total / 3)));
}

/** A metric's mean over the first and over the last steps. */
function ends(name) {
  const values = metric(name);
  const window = summaryWindow();
  return [meanOf(values, 0, window), meanOf(values, values.length - window, values.length)];
}

/** A remark where the page has some of the steps only; null where it has all. */
function sampledRemark(kept, total, what) {
  if (kept >= total) return null;
  return el("p", { class: "remark" }, `This file holds ${what} of ${kept} of ${total.toLocaleString("en")} steps, spread over the run.`);
}

const WITHOUT_CONTRAST =
  "Both contrastive terms are switched off in this run: it has no representations and no pairs.";
