"use strict";
// ---- gallery: outlines on and off ----
const gallery = document.getElementById("gallery");
for (const box of document.querySelectorAll(".switches input")) {
  const apply = () => gallery.classList.toggle(`hide-${box.value}`, !box.checked);
  box.addEventListener("change", apply);
  apply(); // a browser may restore a box's state after a reload
}

// ---- gallery: zoom and pan, by the viewBox ----
for (const article of document.querySelectorAll("#gallery article")) {
  const viewer = article.querySelector(".viewer");
  const svg = viewer.querySelector("svg");
  const [, , width, height] = svg.getAttribute("viewBox").split(" ").map(Number);
  let x = 0, y = 0, zoom = 1, pointer = null;
  const show = () => {
    x = Math.min(Math.max(0, x), width - width / zoom);
    y = Math.min(Math.max(0, y), height - height / zoom);
    svg.setAttribute("viewBox", `${x} ${y} ${width / zoom} ${height / zoom}`);
    viewer.classList.toggle("zoomed", zoom > 1);
    article.querySelector("output").textContent = `${zoom.toFixed(1).replace(".0", "")}×`;
  };
  const scale = (factor, u = 0.5, v = 0.5) => { // (u, v), 0..1, is the point of the view that keeps its place
    const before = zoom;
    zoom = factor ? Math.min(16, Math.max(1, zoom * factor)) : 1;
    if (zoom < 1.01) zoom = 1;
    x += u * width * (1 / before - 1 / zoom);
    y += v * height * (1 / before - 1 / zoom);
    show();
  };
  const point = (event) => {
    const box = svg.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  };
  for (const button of article.querySelectorAll("[data-zoom]"))
    button.addEventListener("click", () => scale(Number(button.dataset.zoom)));
  viewer.addEventListener("dblclick", (event) => scale(1.5, ...point(event)));
  viewer.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return; // the wheel alone scrolls the page
    event.preventDefault();
    scale(event.deltaY < 0 ? 1.25 : 0.8, ...point(event));
  }, { passive: false });
  viewer.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    const factor = { "+": 1.5, "=": 1.5, "-": 1 / 1.5, "0": 0 }[event.key];
    if (factor === undefined && !(step && zoom > 1)) return;
    event.preventDefault();
    if (step) {
      x += (step[0] * width) / zoom / 5;
      y += (step[1] * height) / zoom / 5;
      show();
    } else scale(factor);
  });
  viewer.addEventListener("pointerdown", (event) => {
    if (zoom === 1 || event.button) return;
    pointer = [event.clientX, event.clientY];
    viewer.setPointerCapture(event.pointerId);
  });
  viewer.addEventListener("pointermove", (event) => {
    if (!pointer) return;
    const box = svg.getBoundingClientRect();
    x -= ((event.clientX - pointer[0]) / box.width) * (width / zoom);
    y -= ((event.clientY - pointer[1]) / box.height) * (height / zoom);
    pointer = [event.clientX, event.clientY];
    show();
  });
  for (const end of ["pointerup", "pointercancel"]) viewer.addEventListener(end, () => { pointer = null; });
}

// ---- table: sort and filter ----
const table = document.getElementById("table");
if (table) {
  const rows = [...table.tBodies[0].rows];
  const value = (row, column) => {
    const cell = row.cells[column], text = cell.dataset.value ?? cell.textContent.trim();
    return text !== "" && !Number.isNaN(Number(text)) ? Number(text) : text;
  };
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => heading.firstElementChild.addEventListener("click", () => {
    const down = heading.getAttribute("aria-sort") === "ascending";
    for (const cell of headings) cell.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    rows.sort((a, b) => {
      const [p, q] = [value(a, column), value(b, column)];
      const order = typeof p === "number" && typeof q === "number" ? p - q : String(p).localeCompare(String(q), undefined, { numeric: true });
      return down ? -order : order;
    });
    table.tBodies[0].append(...rows);
  }));
  const words = document.getElementById("words"), organ = document.getElementById("organ");
  const filter = () => {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) {
      const text = `${row.cells[0].textContent} ${row.cells[1].textContent}`.toLowerCase();
      row.hidden = !wanted.every((word) => text.includes(word)) || (organ.value !== "" && row.dataset.organ !== organ.value);
    }
    document.getElementById("count").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} images`;
  };
  words.addEventListener("input", filter);
  organ.addEventListener("change", filter);
  filter();
}
