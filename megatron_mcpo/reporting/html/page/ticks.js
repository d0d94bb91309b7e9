// Where an axis has its marks. Every loop here is bounded by a count, whatever the values are.

const MOST_TICKS = 12;

/** Round numbers between low and high (about `count`); for equal, nearly equal or unknown ends what can be told apart. */
function ticks(low, high, count = 6) {
  if (!Number.isFinite(low) || !Number.isFinite(high)) return [];
  if (!(high > low)) return [low];
  const step = niceStep(high / count - low / count);
  const first = Math.ceil(low / step - 1e-9);
  // Where a step is lost in the rounding of the values, they are not told apart by any marks.
  if (!Number.isFinite(first * step) || low + step === low || high - step === high) return [low, high];
  const found = [];
  for (let i = 0; i < MOST_TICKS; i++) {
    const value = Number(((first + i) * step).toPrecision(15));
    if (!(value <= high + step * 1e-9)) break;
    if (value !== found[found.length - 1]) found.push(value);
  }
  return found;
}

/** The least of 1, 2, 5 times a power of ten that is not below the step. */
function niceStep(step) {
  const power = 10 ** Math.floor(Math.log10(step));
  const factor = [1, 2, 5, 10].find((candidate) => candidate * power >= step * (1 - 1e-9)) || 10;
  return factor * power;
}

/** Least and largest of the finite numbers; null where there is none. */
function extent(lists) {
  let low = Infinity;
  let high = -Infinity;
  for (const values of lists) {
    for (const value of values) {
      if (value === null || !Number.isFinite(value)) continue;
      if (value < low) low = value;
      if (value > high) high = value;
    }
  }
  return low <= high ? [low, high] : null;
}

/** An interval that is wide enough to draw in. Differences are taken of halves: those of two numbers might be infinite. */
function widened([low, high]) {
  const margin = (high / 2 - low / 2) * 0.12;
  const room = Math.abs(high) > 0 ? Math.abs(high) * 0.5 : 1;
  const more = margin > Math.abs(high) * 1e-9 ? margin : room;
  return [Math.max(low - more, -Number.MAX_VALUE), Math.min(high + more, Number.MAX_VALUE)];
}

/** What an axis writes beside its marks: digits enough to tell them apart. */
function tickLabels(values) {
  const labels = values.map(shown);
  return new Set(labels).size === labels.length ? labels : values.map((value) => String(Number(value.toPrecision(12))));
}
