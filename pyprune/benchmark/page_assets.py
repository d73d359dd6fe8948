"""Style and script of the page. Without the script the page is whole, but unsorted and unfiltered."""

STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #f5f6f8; color: #262c35;
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; }
main { max-width: 1320px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { margin: 0; font-size: 26px; }
h2 { margin: 40px 0 4px; font-size: 20px; overflow-wrap: anywhere; }
h3 { margin: 0 0 10px; font-size: 16px; }
p { margin: 4px 0 10px; color: #5b6572; max-width: 900px; }
a { color: #3565a8; text-decoration: none; } a:hover { text-decoration: underline; }
.block, .tile { background: #fff; border: 1px solid #e3e6ea; border-radius: 8px; }
.block { margin-top: 16px; padding: 18px 22px; overflow-x: auto; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-top: 14px; }
.tile { padding: 12px 16px; }
.tile b { display: block; font-size: 20px; font-weight: 600; }
.tile span { color: #5b6572; font-size: 13px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th { text-align: left; font-weight: 500; color: #5b6572; }
td, th { padding: 5px 12px 5px 0; border-bottom: 1px solid #eef0f3; vertical-align: top; }
thead th { border-bottom: 1px solid #cfd4da; position: relative; }
td.n, th.n { text-align: right; white-space: nowrap; }
td.id a { white-space: nowrap; }
small { color: #7a8390; font-size: 12px; display: block; }
.share { display: inline-block; width: 56px; height: 7px; margin-right: 8px; background: #e3e6ea; border-radius: 4px; }
.share i { display: block; height: 100%; background: #3565a8; border-radius: 4px; }
.bad { color: #b3261e; font-weight: 600; } .good { color: #1f8a70; }
th button { all: unset; cursor: pointer; } th button:hover { color: #262c35; }
th[aria-sort=ascending] button::after { content: " ▲"; font-size: 10px; }
th[aria-sort=descending] button::after { content: " ▼"; font-size: 10px; }
.filters { display: none; position: sticky; top: 0; z-index: 1; gap: 12px; padding: 10px 0; background: #f5f6f8; }
.filters.ready { display: flex; }
.filters select, .filters input { font: inherit; padding: 4px 8px; border: 1px solid #cfd4da; border-radius: 6px;
                                  background: #fff; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(380px, 1fr)); gap: 18px; }
.plots figure { margin: 0; } .plots figcaption { font-size: 14px; font-weight: 600; }
svg { display: block; width: 100%; height: auto; }
details { border-bottom: 1px solid #eef0f3; padding: 6px 0; }
details.block { border-bottom: 1px solid #e3e6ea; padding: 14px 22px; }
summary { cursor: pointer; } summary code { font-weight: 600; }
code { font: 13px/1.4 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre { margin: 8px 0; padding: 8px 12px; background: #f5f6f8; border-radius: 6px; overflow-x: auto; user-select: all; }
[hidden] { display: none !important; }
"""

SCRIPT = """
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  table.querySelectorAll("thead th").forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      table.querySelectorAll("thead th").forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const body = table.tBodies[0], value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const order = (a, b) => {
        const [x, y] = [value(a), value(b)], [p, q] = [Number(x), Number(y)];
        if (x === "" || y === "") return (x === "") - (y === "");  // what was not measured comes last
        const sign = down ? -1 : 1;
        return sign * (Number.isNaN(p) || Number.isNaN(q) ? x.localeCompare(y) : p - q);
      };
      body.append(...[...body.rows].sort(order));
    });
  });
}
const operator = document.querySelector("#operator"), text = document.querySelector("#text");
function filter() {
  const words = text.value.toLowerCase().split(/\\s+/);
  for (const part of document.querySelectorAll("[data-operator]")) {
    const named = !operator.value || part.dataset.operator === operator.value;
    const found = words.every(word => (part.dataset.id ?? "").toLowerCase().includes(word));
    part.hidden = !named || ("id" in part.dataset && !found);
  }
}
operator.addEventListener("change", filter);
text.addEventListener("input", filter);
document.querySelector(".filters").classList.add("ready");
function reveal() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target instanceof HTMLDetailsElement) { target.open = true; target.scrollIntoView(); }
}
window.addEventListener("hashchange", reveal);
reveal();
"""
