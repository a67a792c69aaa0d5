"use strict";
(() => {
  const data = (id) => JSON.parse(document.getElementById(id).textContent);
  const runAddress = data("run-address");
  const isRun = (id) => typeof id === "string" && /^[0-9a-f]{32}$/.test(id);

  for (const [id, plot] of Object.entries(data("plots"))) {
    const place = document.getElementById(`plot-${id}`);
    Plotly.newPlot(place, plot.data, plot.layout, { displayModeBar: false, responsive: true, scrollZoom: false });
    if (runAddress) {
      // Points carry their run's id.
      place.on("plotly_click", (event) => {
        const id = event.points[0].customdata;
        if (isRun(id)) window.open(runAddress + id, "_blank", "noopener");
      });
    }
  }

  // Paper has another width than the window.
  window.addEventListener("beforeprint", () => document.querySelectorAll(".plot").forEach((place) => Plotly.Plots.resize(place)));

  const root = document.documentElement;
  document.getElementById("theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    try { localStorage.setItem("emsweep-theme", root.dataset.theme); } catch (error) { /* a file may have no storage */ }
  });

  const table = document.getElementById("run-table");
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    heading.firstElementChild.addEventListener("click", () => {
      const descending = heading.getAttribute("aria-sort") === "ascending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const body = table.tBodies[0];
      const key = (row) => {
        const cell = row.cells[column];
        return cell.dataset.value === undefined ? cell.textContent.trim() : Number(cell.dataset.value);
      };
      const missing = (value) => value === "–";
      const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
      // What is missing stays at the end in both directions.
      const rows = [...body.rows].map((row) => [key(row), row]);
      rows.sort(([a], [b]) => missing(a) - missing(b) || (descending ? -1 : 1) * compare(a, b));
      body.append(...rows.map(([, row]) => row));
    });
  });
})();
