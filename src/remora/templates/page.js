"use strict";
// What the scripts of a report and of a comparison share. Texts enter a page as text contents only.

const byId = (id) => document.getElementById(id);
const byName = new Intl.Collator("en").compare;
const data = JSON.parse(byId("data").textContent);
const percent = (share) => `${(100 * share).toFixed(1)}%`;
const PAGE = matchMedia("(max-width: 40rem)").matches ? 10 : 50;  // messages shown at a time

function fillSlots(node, values) {
  for (const [slot, value] of Object.entries(values)) {
    node.querySelector(`[data-slot="${slot}"]`).textContent = value;
  }
}

// Adds the next messages to a list, each a copy of a template that `fill` fills; returns whether
// more are left.
function addMessages(list, template, messages, fill) {
  for (const each of messages.slice(list.children.length, list.children.length + PAGE)) {
    const item = document.createElement("li");
    item.append(template.content.cloneNode(true));
    fill(item, each);
    list.append(item);
  }
  return list.children.length < messages.length;
}

// Labels in the order of their names, as options of a field
function addLabels(field) {
  data.labels
    .map((label, place) => new Option(label, place))
    .sort((a, b) => byName(a.text, b.text))
    .forEach((option) => field.append(option));
}

function addButton(cell, name, act) {
  const button = document.createElement("button");
  button.type = "button";
  button.append(...cell.childNodes);
  if (name) button.title = name;
  button.addEventListener("click", () => act(button));
  cell.append(button);
}

// Sortable tables

function valueOf(row, column) {
  const text = row.cells[column].textContent;
  const number = Number(text.replace(/[,%]/g, ""));
  return column === 0 || Number.isNaN(number) ? text : number;
}

function makeSortable(table, isSorted) {
  [...table.tHead.rows[0].cells].forEach((cell, column) => addButton(cell, "", () => {
    const rises = cell.ariaSort === "descending" || (cell.ariaSort !== "ascending" && column === 0);
    sortBy(table, column, rises);
    isSorted();
  }));
}

function sortBy(table, column, rises) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((other) => other.removeAttribute("aria-sort"));
  heads[column].setAttribute("aria-sort", rises ? "ascending" : "descending");
  const rows = [...table.tBodies[0].rows].sort((a, b) => {
    const [x, y] = [valueOf(a, column), valueOf(b, column)];
    const order = typeof x === "string" ? byName(x, y) : x - y;
    return rises ? order : -order;
  });
  table.tBodies[0].append(...rows);
}

