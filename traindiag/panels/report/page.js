"use strict";
// Draws each figure when it comes near, in the theme of the page. Figures were made for the light theme; the colours
// of the dark one replace theirs by name.
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const figures = read("figures");
  const dark = read("dark");
  const root = document.documentElement;
  const drawn = new Set();

  const themed = (id) => {
    const figure = figures[id];
    if (root.dataset.theme !== "dark") return structuredClone(figure);
    const swap = (value) => {
      if (typeof value === "string") {
        if (value in dark) return dark[value];
        const cut = value.startsWith("rgba(") ? value.lastIndexOf(",") : -1;
        return cut > 0 && value.slice(0, cut) in dark ? dark[value.slice(0, cut)] + value.slice(cut) : value;
      }
      if (Array.isArray(value)) return value.map(swap);
      if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, swap(v)]));
      return value;
    };
    return swap(figure);
  };
  const config = { displaylogo: false, responsive: true, displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false,
                   modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
  const draw = (place) => {
    const { data, layout, frames } = themed(place.dataset.figure);
    drawn.add(place);
    return Plotly.newPlot(place, data, layout, config).then(() => (frames ? Plotly.addFrames(place, frames) : null));
  };
  const places = [...document.querySelectorAll(".plot")];
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      watcher.unobserve(entry.target);
      if (!drawn.has(entry.target)) draw(entry.target);
    }
  }, { rootMargin: "600px" });
  for (const place of places) {
    place.style.minHeight = `${figures[place.dataset.figure].layout.height}px`;
    watcher.observe(place);
  }
  const all = () => Promise.all(places.filter((p) => !drawn.has(p)).map(draw));
  window.addEventListener("beforeprint", all);

  const button = document.getElementById("theme");
  const set = (theme) => {
    root.dataset.theme = theme;
    button.textContent = theme === "dark" ? "Light" : "Dark";
    for (const place of drawn) draw(place);
  };
  const wanted = new URLSearchParams(location.search).get("theme") || (location.hash === "#dark" ? "dark" : "");
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  set(["dark", "light"].includes(wanted) ? wanted : system);
  button.addEventListener("click", () => set(root.dataset.theme === "dark" ? "light" : "dark"));

  for (const head of document.querySelectorAll("th button")) {
    head.addEventListener("click", () => {
      const cell = head.parentElement;
      const up = cell.getAttribute("aria-sort") !== "ascending";
      for (const other of cell.parentElement.children) other.removeAttribute("aria-sort");
      cell.setAttribute("aria-sort", up ? "ascending" : "descending");
      const at = [...cell.parentElement.children].indexOf(cell);
      const body = cell.closest("table").tBodies[0];
      const key = (row) => row.children[at].dataset.sort ?? row.children[at].textContent;
      const order = (a, b) => (Number.isNaN(Number(a)) || Number.isNaN(Number(b)) || a === "" || b === ""
        ? a.localeCompare(b, undefined, { numeric: true }) : Number(a) - Number(b));
      [...body.rows].sort((a, b) => (up ? 1 : -1) * order(key(a), key(b))).forEach((row) => body.append(row));
    });
  }
  for (const link of document.querySelectorAll("a[href^='#']")) {
    link.addEventListener("click", () => {
      const target = document.getElementById(link.hash.slice(1));
      if (target instanceof HTMLDetailsElement) target.open = true;
    });
  }
  if (new URLSearchParams(location.search).has("all")) all();
})();
