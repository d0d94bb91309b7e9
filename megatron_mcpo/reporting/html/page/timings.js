// Where the time of a step goes: phases as stacked bars, their shares, memory and pace.

const PHASES = [
  { name: "time/rollout", label: "rollout and rewards", colour: "#2a7fc1" },
  { name: "time/wait_for_rollouts", label: "wait for rollouts", colour: "#2a7fc1" },
  { name: "time/sleep", label: "engine goes to sleep", colour: "#f0e442" },
  { name: "time/score", label: "scores", colour: "#56b4e9" },
  { name: "time/update", label: "update", colour: "#d55e00" },
  { name: "time/wake", label: "engine wakes", colour: "#7b5ea7" },
  { name: "sync/seconds", label: "weight sync", colour: "#009e73" },
  { name: "time/verify", label: "check of the weight sync", colour: "#cc79a7" },
  { name: "time/diagnose", label: "gradients by term, domain", colour: "#e69f00" },
];
const MOST_BARS = 120;

function timingsSection() {
  if (!hasMetric("time/step")) return absent("No step has timings yet.");
  const phases = PHASES.filter((phase) => hasMetric(phase.name));
  const rest = { name: "rest", label: "the rest", colour: "#8a8a8a" };
  const seconds = phases.map((phase) => metric(phase.name));
  const whole = metric("time/step");
  const others = whole.map((value, i) => (value === null ? null : Math.max(0, value - seconds.reduce((sum, column) => sum + (column[i] || 0), 0))));
  const parts = [...phases, rest].map((phase, i) => ({ ...phase, values: i < phases.length ? seconds[i] : others }));
  const steps = RUN.metrics.steps;
  return el(
    "div",
    {},
    phaseBars(parts, steps),
    el("ul", { class: "legend" }, parts.map((part) => el("li", {}, swatch({ colour: part.colour, bold: true }), part.label))),
    phaseTable(parts, whole),
    el(
      "div",
      { class: "charts" },
      lineChart({ title: "Seconds per step", steps, series: [{ name: "time/step", ...domainStyle(0), values: whole }] }),
      lineChart({ title: "Tokens per second", about: "trained tokens over the step's time", steps, series: [{ name: "tokens per second", ...domainStyle(1), values: pace(whole) }] }),
      lineChart({ title: "Peak memory", about: "GiB", steps, series: [{ name: "memory/peak_gib", ...domainStyle(2), values: metric("memory/peak_gib") }] }),
      hasMetric("engine/busy") ? lineChart({ title: "Who was busy", about: "share of a step in which the engines had requests, and in which the trainer did not wait for rollouts", steps, series: [{ name: "engines", ...domainStyle(0), values: metric("engine/busy") }, { name: "trainer", ...domainStyle(1), values: trainerBusy(whole) }] }) : "",
    ),
  );
}

function trainerBusy(whole) {
  const waited = metric("time/wait_for_rollouts");
  return whole.map((seconds, i) => (!seconds || waited[i] === null ? null : 1 - waited[i] / seconds));
}

function pace(whole) {
  return metric("tokens/trained").map((tokens, i) => (tokens === null || !whole[i] ? null : tokens / whole[i]));
}

/** A bar a step; of many steps, a bar for each of MOST_BARS spans, with their means. */
function phaseBars(parts, steps) {
  const bars = Math.min(steps.length, MOST_BARS);
  const spans = Array.from({ length: bars }, (_, i) => [Math.floor((i * steps.length) / bars), Math.floor(((i + 1) * steps.length) / bars)]);
  const stacks = spans.map(([from, to]) => parts.map((part) => meanOf(part.values, from, to) || 0));
  const most = Math.max(...stacks.map((stack) => stack.reduce((sum, value) => sum + value, 0)));
  const wide = { width: window.innerWidth > 860 ? 1040 : 480, height: 260, left: 56, right: 8, top: 10, bottom: 28 };
  const y = (value) => wide.height - wide.bottom - (most > 0 ? value / most : 0) * (wide.height - wide.top - wide.bottom);
  const each = (wide.width - wide.left - wide.right) / bars;
  const columns = stacks.map((stack, i) => {
    let below = 0;
    const boxes = stack.map((value, k) => {
      const box = svg("rect", { x: wide.left + i * each + 0.5, width: Math.min(60, Math.max(1, each - 1)), y: y(below + value), height: y(below) - y(below + value), fill: parts[k].colour });
      below += value;
      return box;
    });
    const [from, to] = spans[i];
    const when = to - from > 1 ? `steps ${steps[from]} to ${steps[to - 1]}` : `step ${steps[from]}`;
    const title = `${when}: ${stack.map((value, k) => `${parts[k].label} ${duration(value)}`).join(", ")}`;
    return svg("g", {}, svg("title", {}, title), boxes);
  });
  const marks = ticks(0, most, 4).map((value) => [
    svg("line", { class: "grid", x1: wide.left, x2: wide.width - wide.right, y1: y(value), y2: y(value) }),
    svg("text", { x: wide.left - 6, y: y(value) + 4, "text-anchor": "end" }, `${shown(value)} s`),
  ]);
  const named = spans.filter((_, i) => i % Math.ceil(bars / (wide.width / 80)) === 0);
  const labels = named.map(([from]) => {
    const i = spans.findIndex((span) => span[0] === from);
    return svg("text", { x: wide.left + i * each + Math.min(30, each / 2), y: wide.height - 10, "text-anchor": "middle" }, String(steps[from]));
  });
  const picture = svg("svg", { viewBox: `0 0 ${wide.width} ${wide.height}`, role: "img", "aria-label": "Seconds of each phase by step; the table below has their means" }, svg("g", { class: "axes" }, marks, labels), columns);
  return el("figure", { class: "chart wide" }, el("figcaption", {}, el("strong", {}, "Phases of a step")), picture);
}

function phaseTable(parts, whole) {
  const mean = meanOf(whole, 0, whole.length);
  const rows = parts.map((part) => {
    const known = meanOf(part.values, 0, part.values.length);
    const sum = part.values.reduce((total, value) => total + (value || 0), 0);
    const all = whole.reduce((total, value) => total + (value || 0), 0);
    return [el("span", {}, swatch({ colour: part.colour, bold: true }), part.label), duration(known), percent(sum / all)];
  });
  rows.push([el("strong", {}, "step"), duration(mean), "100%"]);
  return table(["phase", "mean, where it ran", "share of the time"], rows);
}
