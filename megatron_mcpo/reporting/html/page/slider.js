// A slider over the steps of a list, with its value beside it, buttons for the neighbours, and one that plays.

const PLAY_MILLISECONDS = 350;

/** steps: ascending; change(place): called with the position in steps, also at once. Returns { node, set }. */
function stepSlider({ label, steps, start, change }) {
  const value = el("output", { class: "step" });
  const range = el("input", {
    type: "range", min: 0, max: steps.length - 1, value: start, "aria-label": label, disabled: steps.length < 2,
  });
  let timer = null;
  const set = (place) => {
    range.value = String(Math.min(steps.length - 1, Math.max(0, place)));
    const step = steps[Number(range.value)];
    value.textContent = `step ${step}`;
    range.setAttribute("aria-valuetext", `step ${step}`);
    change(Number(range.value));
  };
  const stop = () => {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
  };
  const advance = () => {
    if (!play.isConnected || Number(range.value) >= steps.length - 1) stop();
    else set(Number(range.value) + 1);
  };
  const toggle = () => {
    if (timer !== null) {
      stop();
      return;
    }
    if (Number(range.value) >= steps.length - 1) set(0);
    timer = setInterval(advance, PLAY_MILLISECONDS);
    play.textContent = "Stop";
  };
  const play = el("button", { type: "button", click: toggle, disabled: steps.length < 2 }, "Play");
  range.addEventListener("input", () => set(Number(range.value)));
  const node = el("div", { class: "slider" }, play, range, value);
  set(start);
  return { node, set };
}
