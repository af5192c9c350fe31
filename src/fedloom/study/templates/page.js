
"use strict";
// Sorts and filters tables. The page is whole without it: buttons and boxes are made here, so that none lies there dead.
(() => {
  const LONG = 15; // rows from which a table gets a box to filter by
  const collator = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });
  const key = (row, column) => {
    const cell = row.cells[column];
    return "v" in cell.dataset ? cell.dataset.v : cell.textContent.trim();
  };
  const sort = (table, head, column) => {
    const text = head.classList.contains("t");
    const before = head.getAttribute("aria-sort");
    const up = before ? before === "descending" : text;
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => [key(row, column), row]);
    rows.sort(([a], [b]) => {
      if (a === "" || b === "") return (a === "") - (b === ""); // what was not measured comes last either way
      const order = text ? collator.compare(a, b) : a - b;
      return up ? order : -order;
    });
    body.append(...rows.map(([, row]) => row));
  };
  const filter = (table, place) => {
    const rows = [...table.tBodies[0].rows];
    const label = document.createElement("label");
    const box = document.createElement("input");
    const found = document.createElement("output");
    box.type = "search";
    label.className = "filter";
    label.append("Filter", box, found);
    box.addEventListener("input", () => {
      const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
        shown += !row.hidden;
      }
      found.textContent = words.length ? `${shown} of ${rows.length} rows` : "";
    });
    place.before(label);
  };
  for (const place of document.querySelectorAll(".scroll")) {
    const table = place.querySelector("table.sortable");
    if (!table) continue;
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      if (table.tBodies[0].rows.length < 2) return;
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      button.addEventListener("click", () => sort(table, head, column));
      head.append(button);
    });
    if (table.tBodies[0].rows.length > LONG) filter(table, place);
  }
  // Only what scrolls takes a stop of the Tab key.
  const stops = () => {
    for (const place of document.querySelectorAll(".scroll")) {
      if (place.scrollWidth > place.clientWidth) place.tabIndex = 0;
      else place.removeAttribute("tabindex");
    }
  };
  stops();
  addEventListener("resize", stops);
  // On paper everything is open.
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    for (const one of closed) one.open = true;
  });
  addEventListener("afterprint", () => {
    for (const one of closed) one.open = false;
  });
})();
