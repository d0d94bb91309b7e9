// Curves over the steps: by domain, of the whole run, and any other metric by name.

const DOMAIN_CHARTS = [
  { key: "reward", title: "Reward", about: "mean over the rollouts of a step", share: true, mean: "reward/mean" },
  { key: "nonzero_advantage", title: "Prompts with a nonzero advantage", about: "share of prompts whose rewards differ", share: true, mean: "nonzero_advantage" },
  { key: "response_tokens", title: "Response length", about: "tokens", mean: "response_tokens" },
  { key: "truncated", title: "Truncated", about: "share of rollouts at the response limit", share: true, mean: "truncated" },
  { key: "entropy", title: "Entropy", about: "nats per token", mean: "entropy" },
  { key: "kl", title: "KL to the reference", about: "nats per token", mean: "kl" },
  { key: "engine/logprob_diff", title: "Engine mismatch", about: "difference of log-probs", mean: "engine/logprob_diff_mean" },
  { key: "contrast/auc_cross_domain", title: "Ranking across domains", about: "correct above incorrect; chance 0.5", share: true, mean: "contrast/auc_cross_domain" },
  { key: "contrast/anchors", title: "Anchors", about: "rollouts that are one of either term" },
  { key: "contrast/positives", title: "Positives", about: "of an anchor, from other domains" },
  { key: "errors", title: "Groups skipped", about: "their verifier failed", mean: "groups/errors" },
];

const PLAIN_CHARTS = [
  { title: "Policy loss", names: ["loss/policy"] },
  { title: "KL loss", names: ["loss/kl"] },
  { title: "Contrastive losses", about: "without their weights", names: ["loss/cross_domain", "loss/in_domain"] },
  { title: "Gain of the contrastive terms", about: "nats; chance 0", names: ["contrast/gain_cross_domain", "contrast/gain_in_domain"] },
  { title: "Gradient norm", about: "before it is clipped", names: ["grad_norm"] },
  { title: "Learning rate", names: ["lr"] },
  { title: "Ratio and clipping", names: ["ratio", "clip_fraction"] },
  { title: "Importance", about: "of the engine mismatch", names: ["importance/weight", "importance/capped"] },
  { title: "Alignment", about: "of representations", names: ["contrast/alignment"] },
  { title: "Uniformity", about: "of representations", names: ["contrast/uniformity"] },
];

function curvesSection() {
  if (!RUN.metrics.total && !RUN.evaluations.total) return absent("No metric is on file yet.");
  const state = { hidden: new Set(), smoothing: startingSmoothing() };
  const grid = el("div", { class: "charts" });
  const redraw = () => grid.replaceChildren(...chartsOf(state));
  redraw();
  return el("div", {}, el("div", { class: "controls" }, domainToggles(state.hidden, redraw), smoothingControl(state, redraw)), grid, otherMetrics());
}

/** An odd number of steps: none for a handful, more for a long run. */
function startingSmoothing() {
  const steps = RUN.metrics.steps.length;
  return steps < 8 ? 1 : steps < 60 ? 3 : steps < 300 ? 9 : 25;
}

function domainToggles(hidden, change) {
  const boxes = RUN.domains.map((_, domain) => {
    const flip = (event) => {
      if (event.target.checked) hidden.delete(domain);
      else hidden.add(domain);
      change();
    };
    return el("label", { class: "toggle" }, el("input", { type: "checkbox", checked: !hidden.has(domain), change: flip }), domainTag(domain));
  });
  return el("fieldset", { class: "toggles" }, el("legend", {}, "Domains"), boxes);
}

function smoothingControl(state, change) {
  const sizes = [1, 3, 9, 25, 75].filter((size) => size === 1 || size < RUN.metrics.steps.length);
  if (!sizes.includes(state.smoothing)) state.smoothing = 1;
  const pick = (event) => {
    state.smoothing = Number(event.target.value);
    change();
  };
  const options = sizes.map((size) => el("option", { value: size, selected: size === state.smoothing }, size === 1 ? "off" : `mean of ${size}`));
  return el("label", {}, "Smoothing ", el("select", { change: pick }, options));
}

function chartsOf({ hidden, smoothing }) {
  const domains = RUN.domains.map((name, domain) => ({ name, ...domainStyle(domain), domain })).filter((one) => !hidden.has(one.domain));
  const charts = DOMAIN_CHARTS.flatMap((chart) => {
    const series = domains.map((one) => ({ ...one, values: metric(`${chart.key}/${one.name}`) }));
    if (chart.mean) series.push({ name: "all", colour: "currentColor", bold: true, values: metric(chart.mean) });
    const known = [...RUN.domains.map((name) => `${chart.key}/${name}`), chart.mean || ""].some(hasMetric);
    return known ? [lineChart({ ...chart, steps: RUN.metrics.steps, series, smoothing })] : [];
  });
  const plain = PLAIN_CHARTS.filter((chart) => chart.names.some(hasMetric)).map((chart) =>
    lineChart({ ...chart, steps: RUN.metrics.steps, series: namedSeries(chart.names), smoothing }),
  );
  charts.splice(1, 0, ...accuracyChart(domains));
  return [...charts, ...plain];
}

function accuracyChart(domains) {
  const { steps, total } = RUN.evaluations;
  if (!total) return [];
  const series = domains.map((one) => ({ ...one, values: accuracyOf(one.name) }));
  series.push({ name: "all", colour: "currentColor", bold: true, values: accuracyOf("mean") });
  return [lineChart({ title: "Held-out accuracy", about: "share of responses to held-out items", steps, series, share: true })];
}

function namedSeries(names) {
  return names.filter(hasMetric).map((name, i) => ({ name, ...domainStyle(i), values: metric(name) }));
}

/** Any metric of metrics.jsonl, chosen by name. */
function otherMetrics() {
  const names = Object.keys(RUN.metrics.columns).filter(hasMetric);
  if (!names.length) return null;
  const place = el("div", { class: "charts" });
  const draw = (name) => place.replaceChildren(lineChart({ title: name, steps: RUN.metrics.steps, series: namedSeries([name]) }));
  const pick = el("select", { id: "metric", change: (event) => draw(event.target.value) }, names.map((name) => el("option", { value: name }, name)));
  draw(names[0]);
  return el("section", {}, el("h2", {}, "Any metric"), el("label", { class: "controls" }, "Metric ", pick), place);
}
