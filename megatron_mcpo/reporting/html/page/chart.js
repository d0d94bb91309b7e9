// A line chart as SVG: faint marks for single steps, lines for their running mean, a cursor for pointer and keys.
//
// Ours and not a library's. uPlot 1.6.32 was measured against it: 51 kB (and 2 kB of CSS) in every report, where this
// file and ticks.js have 9 kB and the whole page 62 kB. It would draw axes and lines, less than half of this file. The
// cursor for keys and its readout, the legend, the running mean and the axis of values from -1e308 to 1e308, which uPlot
// leaves empty, would stay ours. It draws on a canvas: the theme's colours would have to be read and every chart drawn
// again at each change of theme or width, and the labels of axes would not be text that a browser can zoom and print.

const CHART = { width: 420, height: 190, left: 50, right: 20, top: 8, bottom: 24 };

/**
 * title, about: above the chart; steps: ascending; series: [{ name, values, colour, dash, bold }], values parallel to
 * steps, null where unknown; smoothing: steps of the running mean, 1 for none; share: the axis spans at least 0 to 1
 */
function lineChart({ title, about = "", steps, series, smoothing = 1, share = false }) {
  const heading = el("figcaption", {}, el("strong", {}, title), about ? el("span", { class: "about" }, about) : null);
  const drawn = series.filter((one) => one.values.some((value) => Number.isFinite(value) && value !== null));
  if (!drawn.length) return el("figure", { class: "chart" }, heading, absent("No step has this metric."));
  const scale = chartScale(steps, drawn, share);
  const readout = el("output", { class: "readout" });
  const cursor = svg("line", { class: "cursor", y1: CHART.top, y2: CHART.height - CHART.bottom, visibility: "hidden" });
  const picture = svg(
    "svg",
    {
      viewBox: `0 0 ${CHART.width} ${CHART.height}`,
      role: "img",
      tabindex: "0",
      "aria-label": `${title}: ${drawn.map((one) => one.name).join(", ")}; arrow keys move a cursor along the steps`,
    },
    chartAxes(scale),
    drawn.map((one) => chartLine(steps, one, smoothing, scale)),
    cursor,
  );
  addCursor(picture, cursor, readout, steps, drawn, scale);
  return el("figure", { class: "chart" }, heading, picture, readout, drawn.length > 1 ? chartLegend(drawn) : null);
}

/** x and y from steps and values to the picture, and the ends of both axes. */
function chartScale(steps, series, share) {
  let [low, high] = extent(series.map((one) => one.values));
  if (share && low >= 0 && high <= 1) [low, high] = [0, 1];
  [low, high] = widened([low, high]);
  const first = steps[0];
  const last = steps[steps.length - 1];
  const inner = CHART.width - CHART.left - CHART.right;
  const tall = CHART.height - CHART.top - CHART.bottom;
  return {
    low, high, first, last,
    x: (step) => CHART.left + (last > first ? ((step - first) / (last - first)) * inner : inner / 2),
    y: (value) => CHART.top + (1 - (value / 2 - low / 2) / (high / 2 - low / 2)) * tall,
  };
}

function chartAxes(scale) {
  const marks = ticks(scale.low, scale.high);
  const labels = tickLabels(marks);
  const rows = marks.map((value, i) => [
    svg("line", { class: "grid", x1: CHART.left, x2: CHART.width - CHART.right, y1: scale.y(value), y2: scale.y(value) }),
    svg("text", { x: CHART.left - 6, y: scale.y(value) + 4, "text-anchor": "end" }, labels[i]),
  ]);
  const columns = ticks(scale.first, scale.last, 6).filter(Number.isInteger).map((step) =>
    svg("text", { x: scale.x(step), y: CHART.height - 8, "text-anchor": "middle" }, String(step)),
  );
  return svg("g", { class: "axes", "aria-hidden": "true" }, rows, columns);
}

function chartLine(steps, one, smoothing, scale) {
  const line = smoothing > 1 ? smoothed(one.values, smoothing) : one.values;
  const parts = [];
  const isolated = [];
  let open = false;
  line.forEach((value, i) => {
    if (value === null || !Number.isFinite(value)) {
      open = false;
      return;
    }
    const place = `${scale.x(steps[i]).toFixed(1)},${scale.y(value).toFixed(1)}`;
    const alone = !open && (i + 1 === line.length || line[i + 1] === null);
    if (alone) isolated.push(svg("circle", { cx: place.split(",")[0], cy: place.split(",")[1], r: 3, fill: one.colour }));
    parts.push(`${open ? "L" : "M"}${place}`);
    open = true;
  });
  const dots = smoothing > 1 ? chartDots(steps, one, scale) : null;
  const stroke = { stroke: one.colour, "stroke-dasharray": one.dash || null, "stroke-width": one.bold ? 3 : 1.8 };
  return svg("g", {}, dots, svg("path", { d: parts.join(""), fill: "none", "stroke-linejoin": "round", ...stroke }), isolated);
}

/** Single values, as one path of many points. */
function chartDots(steps, one, scale) {
  const parts = one.values.map((value, i) =>
    value === null ? "" : `M${scale.x(steps[i]).toFixed(1)},${scale.y(value).toFixed(1)}h0`,
  );
  return svg("path", { d: parts.join(""), fill: "none", stroke: one.colour, class: "dots" });
}

/** Mean of the `window` values around each, fewer at the ends; null where a value is null. */
function smoothed(values, window) {
  const half = Math.floor(window / 2);
  return values.map((value, i) => {
    if (value === null) return null;
    let sum = 0;
    let count = 0;
    for (let j = Math.max(0, i - half); j <= Math.min(values.length - 1, i + half); j++) {
      if (values[j] === null) continue;
      sum += values[j];
      count += 1;
    }
    return sum / count;
  });
}

function addCursor(picture, cursor, readout, steps, series, scale) {
  let place = steps.length - 1;
  const show = (next) => {
    place = Math.min(steps.length - 1, Math.max(0, next));
    const x = scale.x(steps[place]);
    fill(cursor, { x1: x, x2: x, visibility: "visible" }, []);
    readout.textContent =
      `step ${steps[place]}: ` + series.map((one) => `${one.name} ${shown(one.values[place])}`).join("  ");
  };
  const hide = () => {
    cursor.setAttribute("visibility", "hidden");
    readout.textContent = "";
  };
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * CHART.width;
    show(nearest(steps, scale, x));
  });
  picture.addEventListener("pointerleave", hide);
  picture.addEventListener("focus", () => show(place));
  picture.addEventListener("blur", hide);
  picture.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: steps.length - 1 };
    if (!(event.key in moves)) return;
    event.preventDefault();
    show(moves[event.key]);
  });
}

function nearest(steps, scale, x) {
  let best = 0;
  steps.forEach((step, i) => {
    if (Math.abs(scale.x(step) - x) < Math.abs(scale.x(steps[best]) - x)) best = i;
  });
  return best;
}

function swatch(one) {
  return svg(
    "svg",
    { class: "swatch", viewBox: "0 0 22 8", "aria-hidden": "true" },
    svg("line", {
      x1: 1, x2: 21, y1: 4, y2: 4, stroke: one.colour, "stroke-width": one.bold ? 4 : 3, "stroke-dasharray": one.dash || null,
    }),
  );
}

function chartLegend(series) {
  return el("ul", { class: "legend" }, series.map((one) => el("li", {}, swatch(one), one.name)));
}
