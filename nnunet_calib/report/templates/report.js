"use strict";
(function () {
  const FIRST = 50;
  document.documentElement.classList.add("js");
  const lines = JSON.parse(document.getElementById("case-data").textContent);
  const body = document.querySelector("#case-table tbody");
  const buttons = Array.from(document.querySelectorAll("#case-table thead button"));
  const filter = document.getElementById("filter");
  const method = document.getElementById("method");
  const count = document.getElementById("count");
  const more = document.getElementById("more");
  let order = lines.map((_, index) => index);
  let all = false;

  function value(line, key) {
    if (key === "case" || key === "method" || key === "missed") return line[key];
    return Number({ "inf": Infinity, "-inf": -Infinity, "nan": NaN }[line.values[key]] ?? line.values[key]);
  }

  function text(number) {
    if (number === "nan") return "–";
    if (typeof number === "string") return number === "inf" ? "∞" : number;
    const size = Math.abs(number);
    return number.toFixed(size < 0.01 && size > 0 ? 4 : size < 1 ? 3 : size < 100 ? 2 : 1);
  }

  function cell(tag, content) {
    const element = document.createElement(tag);
    element.textContent = content;
    return element;
  }

  function show() {
    const wanted = filter.value.trim().toLowerCase();
    const kept = order.map((index) => lines[index]).filter((line) =>
      line.case.toLowerCase().includes(wanted) && (!method.value || line.method === method.value));
    const shown = all ? kept : kept.slice(0, FIRST);
    const rows = shown.map((line) => {
      const row = document.createElement("tr");
      const head = cell("th", line.case);
      head.scope = "row";
      row.append(head, cell("td", line.method), ...line.values.map((number) => cell("td", text(number))), cell("td", line.missed));
      return row;
    });
    body.replaceChildren(...rows);
    count.textContent = shown.length + " of " + kept.length + " lines";
    more.hidden = shown.length === kept.length;
  }

  function sort(button) {
    const head = button.closest("th");
    const key = button.dataset.key;
    const ascending = head.getAttribute("aria-sort") === "descending" || !head.hasAttribute("aria-sort");
    buttons.forEach((other) => other.closest("th").removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    const sign = ascending ? 1 : -1;
    order.sort((a, b) => {
      const [x, y] = [value(lines[a], key), value(lines[b], key)];
      if (typeof x === "string") return sign * x.localeCompare(y, undefined, { numeric: true });
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y); // no value: last, both ways
      return x === y ? 0 : sign * (x < y ? -1 : 1);
    });
    show();
  }

  buttons.forEach((button) => button.addEventListener("click", () => sort(button)));
  filter.addEventListener("input", show);
  method.addEventListener("change", show);
  more.addEventListener("click", () => { all = true; show(); });
  window.addEventListener("beforeprint", () => { all = true; show(); });
  show();

  const diagrams = Array.from(document.querySelectorAll(".diagram"));
  const which = document.getElementById("which");
  function choose() {
    diagrams.forEach((diagram, index) => diagram.classList.toggle("shown", !which || index === Number(which.value)));
  }
  if (which) which.addEventListener("change", choose);
  choose();

  document.querySelectorAll(".case-picture input[type=range]").forEach((slider) => {
    const strips = slider.closest("figure").querySelectorAll("img");
    slider.addEventListener("input", () => {
      strips.forEach((strip, index) => { strip.hidden = index !== Number(slider.value); });
      const slice = slider.dataset.slices.split(",")[slider.value];
      slider.closest("label").querySelector("output").textContent = slice;
      slider.setAttribute("aria-valuetext", "slice " + slice);
    });
  });
})();
