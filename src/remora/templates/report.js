"use strict";
// Sorting, filtering, and links from numbers to their messages. The page reads without them.
// Texts enter the page as text contents only.

const byId = (id) => document.getElementById(id);
const byName = new Intl.Collator("en").compare;
const data = JSON.parse(byId("data").textContent);

// Messages

const PAGE = 50;
let matches = [];

function fillSlots(node, values) {
  for (const [slot, value] of Object.entries(values)) {
    node.querySelector(`[data-slot="${slot}"]`).textContent = value;
  }
}

function showMore() {
  const list = byId("message-list");
  for (const each of matches.slice(list.children.length, list.children.length + PAGE)) {
    const item = document.createElement("li");
    item.append(byId("message").content.cloneNode(true));
    fillSlots(item, {
      text: each.text,
      label: data.labels[each.label],
      predicted: data.labels[each.predicted],
      probability: `${(100 * each.probability).toFixed(1)}%`,
      baseline: each.baseline === null ? "none" : data.labels[each.baseline],
      row: each.row,
    });
    list.append(item);
  }
  byId("message-more").hidden = list.children.length >= matches.length;
}

function showMessages() {
  const part = byId("message-filter").value.toLowerCase();
  const label = byId("message-true").value;
  const predicted = byId("message-predicted").value;
  const wrong = byId("message-wrong").checked;
  matches = data.messages.filter((each) =>
    (label === "" || each.label === Number(label)) &&
    (predicted === "" || each.predicted === Number(predicted)) &&
    (!wrong || each.label !== each.predicted) &&
    (part === "" || each.text.toLowerCase().includes(part)));
  const order = byId("message-order").value;
  const sign = order === "surest" ? -1 : 1;
  matches.sort(order === "row"
    ? (a, b) => a.row - b.row
    : (a, b) => sign * (a.probability - b.probability) || a.row - b.row);
  byId("message-list").replaceChildren();
  showMore();
  const what = wrong ? "mistakes" : "messages";
  byId("message-status").textContent = `${matches.length.toLocaleString("en")} ${what}`;
}

function goToMessages(label, predicted, from) {
  byId("message-filter").value = "";
  byId("message-true").value = label ?? "";
  byId("message-predicted").value = predicted ?? "";
  byId("message-wrong").checked = label !== predicted;
  showMessages();
  const back = byId("message-back");
  back.hidden = false;
  back.onclick = () => from.focus();
  byId("messages-heading").focus({preventScroll: true});
  byId("messages").scrollIntoView();
}

for (const id of ["message-true", "message-predicted"]) {
  data.labels
    .map((label, place) => new Option(label, place))
    .sort((a, b) => byName(a.text, b.text))
    .forEach((option) => byId(id).append(option));
}
for (const id of ["message-filter", "message-true", "message-predicted", "message-order", "message-wrong"]) {
  byId(id).addEventListener("input", showMessages);
}
byId("message-more").addEventListener("click", showMore);
byId("message-clear").addEventListener("click", () => {
  byId("message-controls").reset();
  byId("message-wrong").checked = false;
  showMessages();
});

// The confusion matrix: the table's rows and columns are sorted and hidden

const matrix = byId("matrix");
const head = matrix.tHead.rows[0];
const rowOf = new Map(data.shown.map((label, k) => [label, matrix.tBodies[0].rows[k]]));
const headOf = new Map(data.shown.map((label, k) => [label, head.cells[k + 1]]));
const cellOf = new Map();  // by label and prediction
for (const label of data.shown) {
  data.shown.forEach((predicted, k) => cellOf.set(`${label} ${predicted}`, rowOf.get(label).cells[k + 1]));
}
const filled = new Set([...cellOf.keys()].filter((key) => cellOf.get(key).textContent));
const isFilled = (label, predicted) => filled.has(`${label} ${predicted}`);

for (const label of data.shown) {
  for (const predicted of data.shown) {
    if (!isFilled(label, predicted)) continue;
    const cell = cellOf.get(`${label} ${predicted}`);
    const button = document.createElement("button");
    button.type = "button";
    button.tabIndex = -1;
    button.textContent = cell.textContent;
    button.setAttribute("aria-label", cell.title);
    button.addEventListener("click", () => goToMessages(label, predicted, button));
    cell.replaceChildren(button);
  }
}

function showMatrix() {
  const wrong = byId("matrix-wrong").checked;
  const part = byId("matrix-filter").value.toLowerCase();
  const matches = new Set(data.shown.filter((label) => data.labels[label].toLowerCase().includes(part)));
  const isKept = (label) => matches.has(label) ||
    data.shown.some((other) => matches.has(other) && (isFilled(label, other) || isFilled(other, label)));
  const kept = data.shown.filter((label) => isKept(label) && (!wrong || data.mistakes[label]));
  const order = byId("matrix-order").value;
  if (order === "mistakes") kept.sort((a, b) => data.mistakes[b] - data.mistakes[a]);
  if (order === "rows") kept.sort((a, b) => data.rows[b] - data.rows[a]);
  if (order === "name") kept.sort((a, b) => byName(data.labels[a], data.labels[b]));
  head.replaceChildren(head.cells[0], ...kept.map((label) => headOf.get(label)));
  matrix.tBodies[0].replaceChildren(...kept.map((label) => rowOf.get(label)));
  for (const label of kept) {
    const row = rowOf.get(label);
    row.replaceChildren(row.cells[0], ...kept.map((other) => cellOf.get(`${label} ${other}`)));
  }
  for (const label of data.shown) {
    cellOf.get(`${label} ${label}`).classList.toggle("right-hidden", wrong);
  }
  const partners = part && kept.some((label) => !matches.has(label));
  byId("matrix-status").textContent = `${kept.length} of ${data.labels.length} labels` +
    (partners ? ", including those they are confused with" : "");
  makeReachable(matrix.querySelector("td:not(.right-hidden) button"));
}

function makeReachable(button) {  // by the tab key, which stops at one number of the matrix
  for (const other of matrix.querySelectorAll('button[tabindex="0"]')) other.tabIndex = -1;
  if (button) button.tabIndex = 0;
}

// Left and right move through all numbers in reading order, up and down within a column.
const STEPS = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -1, ArrowDown: 1};
matrix.addEventListener("keydown", (event) => {
  const step = STEPS[event.key];
  const from = event.target.closest("td");
  if (!step || !from) return;
  event.preventDefault();
  const isUpright = event.key === "ArrowUp" || event.key === "ArrowDown";
  const buttons = [...matrix.querySelectorAll("td:not(.right-hidden) button")]
    .filter((button) => !isUpright || button.parentNode.cellIndex === from.cellIndex);
  buttons[buttons.indexOf(event.target) + step]?.focus();
});
matrix.addEventListener("focusin", (event) => makeReachable(event.target));
for (const id of ["matrix-order", "matrix-filter", "matrix-wrong"]) {
  byId(id).addEventListener("input", showMatrix);
}

// Tables that link to messages, and sortable tables

function addButton(cell, name, act) {
  const button = document.createElement("button");
  button.type = "button";
  button.append(...cell.childNodes);
  if (name) button.title = name;
  button.addEventListener("click", () => act(button));
  cell.append(button);
}

for (const row of document.querySelectorAll("tr[data-true]")) {
  const {true: label, predicted} = row.dataset;
  addButton(row.querySelector("th"), "Show the messages", (button) =>
    goToMessages(Number(label), predicted === undefined ? undefined : Number(predicted), button));
}

function valueOf(row, column) {
  const text = row.cells[column].textContent;
  const number = Number(text.replace(/[,%]/g, ""));
  return column === 0 || Number.isNaN(number) ? text : number;
}

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((cell, column) => addButton(cell, "", () => {
    const rises = cell.ariaSort === "descending" || (cell.ariaSort !== "ascending" && column === 0);
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    cell.setAttribute("aria-sort", rises ? "ascending" : "descending");
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [valueOf(a, column), valueOf(b, column)];
      const order = typeof x === "string" ? byName(x, y) : x - y;
      return rises ? order : -order;
    });
    table.tBodies[0].append(...rows);
  }));
}

for (const id of ["matrix-controls", "message-controls"]) {
  byId(id).hidden = false;
  byId(id).addEventListener("submit", (event) => event.preventDefault());
}
for (const note of document.querySelectorAll(".js")) note.hidden = false;
showMatrix();
showMessages();
