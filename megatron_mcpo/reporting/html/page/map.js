// Representations of the rollouts on a plane, step by step. A point is a rollout: filled where it is right.

const MAP_SIZE = 640;

function mapSection() {
  if (!RUN.contrastive) return absent(WITHOUT_CONTRAST);
  const { steps, shares, total } = RUN.map;
  if (!steps.length) return absent("No representations are on file yet.");
  const state = { place: steps.length - 1, hidden: new Set(), kind: "all" };
  const canvas = el("canvas", { class: "map", role: "img", width: MAP_SIZE, height: MAP_SIZE });
  const readout = el("output", { class: "readout" });
  const draw = () => drawMap(canvas, steps[state.place], state);
  const slider = stepSlider({
    label: "Step of the map",
    steps: steps.map((entry) => entry.step),
    start: state.place,
    change: (place) => {
      state.place = place;
      readout.textContent = mapCaption(steps[place]);
      draw();
    },
  });
  const pick = (event) => {
    state.kind = event.target.value;
    draw();
  };
  const kinds = ["all", "right", "wrong"].map((kind) => el("option", { value: kind }, kind));
  canvas.addEventListener("click", (event) => openPoint(canvas, steps[state.place], state, event, readout));
  canvas.addEventListener("pointermove", (event) => {
    const point = pointAt(canvas, steps[state.place], state, event);
    canvas.style.cursor = point ? "pointer" : "default";
  });
  document.addEventListener("themechange", draw);
  const axes = shares.map((share, i) => `${["first", "second"][i]} axis ${percent(share)}`).join(", ");
  return el(
    "div",
    {},
    el("div", { class: "controls" }, domainToggles(state.hidden, draw), el("label", {}, "Rollouts ", el("select", { change: pick }, kinds))),
    slider.node,
    readout,
    canvas,
    el("p", { class: "about" }, `Filled: right; hollow: wrong. One plane for all steps (principal components; of the variance: ${axes}). A click opens the rollout.`),
    el("p", {}, el("button", { type: "button", click: () => showStep(steps[state.place].step) }, "Browse the rollouts of this step")),
    sampledRemark(steps.length, total, "representations"),
  );
}

function mapCaption(entry) {
  const number = entry.points.length / 4;
  let right = 0;
  for (let i = 3; i < entry.points.length; i += 4) right += entry.points[i] % 2;
  return `${number < entry.total ? `${number} of ${entry.total}` : number} rollouts, ${percent(right / number)} right`;
}

/** Calls visit(place, x, y, domain, right) for each point that is not filtered out, in pixels of the canvas. */
function eachPoint(entry, { hidden, kind }, visit) {
  for (let i = 0; i < entry.points.length; i += 4) {
    const domain = Math.floor(entry.points[i + 3] / 2);
    const right = entry.points[i + 3] % 2 === 1;
    if (hidden.has(domain) || (kind !== "all" && right !== (kind === "right"))) continue;
    const scale = (MAP_SIZE / 2 - 16) / 1000;
    visit(entry.points[i], MAP_SIZE / 2 + entry.points[i + 1] * scale, MAP_SIZE / 2 - entry.points[i + 2] * scale, domain, right);
  }
}

function drawMap(canvas, entry, state) {
  const density = window.devicePixelRatio || 1;
  canvas.width = MAP_SIZE * density;
  canvas.height = MAP_SIZE * density;
  canvas.setAttribute("aria-label", `Map of step ${entry.step}: ${mapCaption(entry)}`);
  const pen = canvas.getContext("2d");
  pen.scale(density, density);
  pen.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue("--line");
  pen.strokeRect(0.5, 0.5, MAP_SIZE - 1, MAP_SIZE - 1);
  pen.beginPath();
  pen.moveTo(MAP_SIZE / 2, 0);
  pen.lineTo(MAP_SIZE / 2, MAP_SIZE);
  pen.moveTo(0, MAP_SIZE / 2);
  pen.lineTo(MAP_SIZE, MAP_SIZE / 2);
  pen.stroke();
  const radius = entry.points.length > 2000 ? 3 : 4.5;
  pen.lineWidth = 1.2;
  for (const rightNow of [false, true]) {
    eachPoint(entry, state, (place, x, y, domain, right) => {
      if (right !== rightNow) return;
      pen.beginPath();
      pen.arc(x, y, radius, 0, 2 * Math.PI);
      pen.strokeStyle = pen.fillStyle = domainStyle(domain).colour;
      pen.globalAlpha = right ? 0.8 : 0.6;
      if (right) pen.fill();
      else pen.stroke();
    });
  }
  pen.globalAlpha = 1;
}

/** The place in the step's file of the rollout under the pointer; null without one. */
function pointAt(canvas, entry, state, event) {
  const box = canvas.getBoundingClientRect();
  const scale = MAP_SIZE / box.width;
  const at = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  let best = null;
  let least = 10;
  eachPoint(entry, state, (place, x, y, domain) => {
    const distance = Math.hypot(x - at[0], y - at[1]);
    if (distance < least) [best, least] = [{ place, domain }, distance];
  });
  return best;
}

function openPoint(canvas, entry, state, event, readout) {
  const point = pointAt(canvas, entry, state, event);
  if (!point) return;
  if (findRollout(entry.step, point.place)) openRollout(entry.step, point.place);
  else readout.textContent = `a rollout of ${RUN.domains[point.domain]} whose text is not in this file (rollouts/ has it)`;
}
