// Sections, addresses (#section/...) and the theme. A section is built when it is first shown.

const SECTIONS = [
  ["overview", "Overview", overviewSection],
  ["curves", "Curves", curvesSection],
  ["similarity", "Similarity", matrixSection],
  ["map", "Map", mapSection],
  ["rollouts", "Rollouts", rolloutsSection],
  ["timings", "Timings", timingsSection],
  ["settings", "Configuration", settingsSection],
];
const BUILT = new Map();

function route() {
  const parts = location.hash.slice(1).split("/");
  const [name, title, build] = SECTIONS.find(([known]) => known === parts[0]) || SECTIONS[0];
  const isNew = !BUILT.has(name);
  if (isNew) BUILT.set(name, el("section", { id: `section-${name}`, "aria-label": title }, build()));
  const section = BUILT.get(name);
  const main = document.getElementById("main");
  if (section.parentNode !== main) {
    main.replaceChildren(section);
    window.scrollTo(0, 0);
  }
  for (const link of document.querySelectorAll("#sections a")) {
    if (link.getAttribute("href") === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const body = section.firstChild;
  if (body && body.route) body.route(parts);
}

/** The theme follows the system until the button is used. */
function startTheme() {
  const button = document.getElementById("theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const set = (name) => {
    document.documentElement.dataset.theme = name;
    button.textContent = name === "dark" ? "Light" : "Dark";
    document.dispatchEvent(new Event("themechange"));
  };
  dark.addEventListener("change", () => set(dark.matches ? "dark" : "light"));
  button.addEventListener("click", () => set(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
  set(dark.matches ? "dark" : "light");
}

document.getElementById("name").textContent = RUN.name;
document.getElementById("sections").append(...SECTIONS.map(([name, title]) => el("a", { href: `#${name}` }, title)));
startTheme();
window.addEventListener("hashchange", route);
route();
