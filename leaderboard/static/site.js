"use strict";
// The page is complete without this: it adds sorting, by the headings and, where they are hidden, by a menu.
(() => {
  const say = document.createElement("p");
  say.className = "sr";
  say.setAttribute("role", "status");
  document.body.append(say);

  const opposite = { ascending: "descending", descending: "ascending" };

  function reorder(table, key, direction) {
    const value = (body) => body.querySelector(`[data-key="${key}"]`).dataset.v;
    const numeric = key !== "defense";
    const sign = direction === "ascending" ? 1 : -1;
    const bodies = [...table.tBodies].sort((one, other) => {
      const a = value(one), b = value(other);
      // What was not measured stays at the end whichever way the rest goes.
      if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
      return sign * (numeric ? a - b : a.localeCompare(b, "en"));
    });
    table.append(...bodies);
    for (const head of table.tHead.querySelectorAll("th")) {
      if (head.dataset.key === key) head.setAttribute("aria-sort", direction);
      else head.removeAttribute("aria-sort");
    }
    table.classList.toggle("resorted", !(key === "rank" && direction === "ascending"));
  }

  for (const table of document.querySelectorAll("table.board")) {
    const heads = [...table.tHead.querySelectorAll("th")];
    const menu = document.createElement("select");
    const sort = (head, direction) => {
      reorder(table, head.dataset.key, direction);
      menu.value = head.dataset.key;
      say.textContent = `Sorted by ${head.textContent.trim()}, ${direction}`;
    };
    for (const head of heads) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const now = head.getAttribute("aria-sort");
        sort(head, now ? opposite[now] : head.dataset.first);
      });
      menu.append(new Option(head.textContent.trim(), head.dataset.key));
    }
    menu.addEventListener("change", () => {
      const head = heads[menu.selectedIndex];
      sort(head, head.dataset.first);
    });
    if (table.tBodies.length > 1) {
      const label = document.createElement("label");
      label.className = "sorter";
      label.append("Sort by", menu);
      table.before(label);
    }
  }
})();
