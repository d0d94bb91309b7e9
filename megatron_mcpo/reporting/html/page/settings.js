// The resolved configuration, with the meaning of every key.

function settingsSection() {
  const body = el("div", {});
  const draw = (all) => body.replaceChildren(...RUN.settings.map((section) => settingsTable(section, all)).filter(Boolean));
  draw(true);
  const only = el("input", { type: "checkbox", change: (event) => draw(!event.target.checked) });
  return el("div", {}, el("label", { class: "controls" }, only, " only what differs from the default"), body);
}

function settingsTable(section, all) {
  const keys = section.keys.filter((key) => all || !key.default);
  if (!keys.length) return null;
  const rows = keys.map((key) => [
    el("code", {}, key.key),
    el("code", { class: key.default ? "value default" : "value" }, key.value),
    el("span", { class: "about" }, key.about),
  ]);
  return el("section", {}, el("h3", {}, section.name), el("p", { class: "about" }, section.about), table(["key", "value", "meaning"], rows, { numeric: false }));
}
