// Sorting, filtering, and links from numbers to their messages. The page reads without them.

// Messages

let matches = [];

function fillMessage(item, each) {
  fillSlots(item, {
    text: each.text,
    label: data.labels[each.label],
    predicted: data.labels[each.predicted],
    probability: percent(each.probability),
    baseline: each.baseline === null ? "none" : data.labels[each.baseline],
    row: each.row,
    others: each.others.length
      ? ", then " + each.others.map(([label, share]) => `\u2068${data.labels[label]}\u2069 ${percent(share)}`).join(" and ")
      : "",
  });
  fillNearest(item.querySelector(".nearest"), each.nearest.map((place) => data.training[place]));
}

// The training texts nearest to a message, below a line that counts their labels
function fillNearest(box, near) {
  if (!near.length) return box.remove();
  const counts = new Map();
  for (const {label} of near) counts.set(label, (counts.get(label) ?? 0) + 1);
  const ranked = [...counts].sort((a, b) => b[1] - a[1]);
  fillSlots(box, {nearest: ranked.map(([label, count]) => `${count} \u2068${label}\u2069`).join(", ")});
  for (const each of near) {
    const item = byId("neighbour").content.cloneNode(true);
    fillSlots(item, {"near-text": each.text, "near-label": each.label, "near-row": each.row.toLocaleString("en")});
    box.querySelector("ul").append(item);
  }
}

function showMore() {
  byId("message-more").hidden = !addMessages(byId("message-list"), byId("message"), matches, fillMessage);
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

let cameFrom = null;  // the button that led to the messages shown

function goToMessages(label, predicted, from) {
  byId("message-filter").value = "";
  byId("message-true").value = label ?? "";
  byId("message-predicted").value = predicted ?? "";
  byId("message-wrong").checked = label !== predicted;
  showMessages();
  cameFrom = from;
  byId("message-back").hidden = false;
  keepView("messages", true);
  byId("messages-heading").focus({preventScroll: true});
  byId("messages").scrollIntoView();
}

byId("message-back").addEventListener("click", () => history.back());

for (const id of ["message-true", "message-predicted"]) addLabels(byId(id));
byId("message-more").addEventListener("click", showMore);
byId("message-clear").addEventListener("click", () => {
  byId("message-controls").reset();
  byId("message-wrong").checked = false;
  showMessages();
  keepView("messages", false);
});

// The confusion matrix: the table's rows and columns are sorted and hidden

const matrix = byId("matrix");
const head = matrix.tHead.rows[0];
const rowOf = new Map(data.shown.map((label, k) => [label, matrix.tBodies[0].rows[k]]));
const headOf = new Map(data.shown.map((label, k) => [label, head.cells[k + 1]]));
const foot = matrix.tFoot.rows[0];
const footOf = new Map(data.shown.map((label, k) => [label, foot.cells[k + 1]]));
const [totalHead, totalFoot] = [head, foot].map((row) => row.cells[row.cells.length - 1]);
const totalOf = new Map([...rowOf].map(([label, row]) => [label, row.cells[row.cells.length - 1]]));
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
    button.dataset.count = cell.textContent;
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
  const isPercent = byId("matrix-percent").checked;
  head.replaceChildren(head.cells[0], ...kept.map((label) => headOf.get(label)), totalHead);
  foot.replaceChildren(foot.cells[0], ...kept.map((label) => footOf.get(label)), totalFoot);
  matrix.tBodies[0].replaceChildren(...kept.map((label) => rowOf.get(label)));
  for (const label of kept) {
    const row = rowOf.get(label);
    row.replaceChildren(row.cells[0], ...kept.map((other) => cellOf.get(`${label} ${other}`)), totalOf.get(label));
    for (const button of row.querySelectorAll("button")) {
      const count = button.dataset.count;
      button.textContent = isPercent ? `${Math.round(100 * count / data.rows[label])}%` : count;
    }
  }
  for (const label of data.shown) {
    cellOf.get(`${label} ${label}`).classList.toggle("right-hidden", wrong);
  }
  const partners = part && kept.some((label) => !matches.has(label));
  byId("matrix-status").textContent = `${kept.length} of ${data.labels.length} labels` +
    (partners ? ", including those they are confused with" : "");
  makeReachable(matrix.querySelector("td:not(.right-hidden) button"));
  showCue();
}

// What lies outside of the matrix's frame

const frame = matrix.closest(".matrix-frame");
function showCue() {
  const inside = frame.getBoundingClientRect();
  const num = (cells, isOut) => [...cells].filter((cell) => isOut(cell.getBoundingClientRect())).length;
  const below = num(matrix.tBodies[0].rows, (box) => box.top + 4 > inside.bottom);
  const right = num([...head.cells].slice(1), (box) => box.left + 4 > inside.right);
  const parts = [[below, "rows below"], [right, "columns to the right"]].filter(([count]) => count);
  byId("matrix-cue").hidden = !parts.length;
  byId("matrix-cue").textContent =
    `Scroll inside the matrix for ${parts.map(([count, what]) => `${count} more ${what}`).join(" and ")}.`;
}
frame.addEventListener("scroll", showCue, {passive: true});
addEventListener("resize", showCue);

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

// Tables that link to messages, and sortable tables

for (const row of document.querySelectorAll("tr[data-true]")) {
  const {true: label, predicted} = row.dataset;
  addButton(row.querySelector("th"), "Show the messages", (button) =>
    goToMessages(Number(label), predicted === undefined ? undefined : Number(predicted), button));
  const [missed, wrongly] = [".missed", ".wrongly"].map((name) => row.querySelector(name));
  if (missed) {
    addButton(missed, "Show the messages that it misses", (button) => goToMessages(Number(label), undefined, button));
    addButton(wrongly, "Show the messages wrongly predicted as it", (button) => goToMessages(undefined, Number(label), button));
  }
}

for (const table of document.querySelectorAll("table.sortable")) {
  makeSortable(table, () => keepView("labels", false));
}

// A threshold for the confidence: what is answered, and how much of it correctly

function showThreshold() {
  const place = Number(byId("threshold").value);
  const [answered, right] = data.thresholds[place];
  const num = data.thresholds[0][0];
  byId("threshold-value").textContent = `${place}%`;
  byId("threshold").setAttribute("aria-valuetext", `${place}%`);
  byId("threshold-status").textContent = answered
    ? `${answered.toLocaleString("en")} of ${num.toLocaleString("en")} messages are answered ` +
      `(${percent(answered / num)}), ${percent(right / answered)} of them correctly; ` +
      `${(num - answered).toLocaleString("en")} go to a person.`
    : "No message is answered.";
}

// Views: what is chosen in a section stands in the address, so that it can be linked, and Back works

const CONTROLS = {
  messages: {text: "message-filter", label: "message-true", predicted: "message-predicted", order: "message-order", mistakes: "message-wrong"},
  confusion: {order: "matrix-order", label: "matrix-filter", mistakes: "matrix-wrong", percent: "matrix-percent"},
  ...(byId("threshold") ? {calibration: {threshold: "threshold"}} : {}),
};
const SHOW = {messages: showMessages, confusion: showMatrix, calibration: showThreshold};
const isLabel = (id) => id === "message-true" || id === "message-predicted";
const sorted = document.querySelector("table.sortable");
const unsorted = [...sorted.tBodies[0].rows];

function valueIn(id) {
  const control = byId(id);
  if (control.type === "checkbox") return control.checked ? "yes" : "no";
  return isLabel(id) && control.value !== "" ? data.labels[control.value] : control.value;
}

function setIn(id, value) {
  const control = byId(id);
  if (control.type === "checkbox") control.checked = value === "yes";
  else if (isLabel(id)) control.value = value === "" ? "" : data.labels.indexOf(value);
  else control.value = value;
  if (control.selectedIndex === -1) control.selectedIndex = 0;  // an address of another report
}

const defaults = Object.fromEntries(Object.values(CONTROLS).flatMap((names) =>
  Object.values(names).map((id) => [id, valueIn(id)])));

function keepView(section, isNew) {
  const view = new URLSearchParams();
  for (const [name, id] of Object.entries(CONTROLS[section] ?? {})) {
    if (valueIn(id) !== defaults[id]) view.set(name, valueIn(id));
  }
  if (section === "labels") {
    const column = [...sorted.tHead.rows[0].cells].findIndex((cell) => cell.ariaSort);
    view.set("sort", column);
    view.set("rises", sorted.tHead.rows[0].cells[column].ariaSort === "ascending" ? "yes" : "no");
  }
  const address = `#${section}${String(view) && `?${view}`}`;
  if (address !== location.hash) history[isNew ? "pushState" : "replaceState"](null, "", address);
}

function showView(isBack) {
  const [section, words] = location.hash.slice(1).split("?");
  const view = new URLSearchParams(words ?? "");
  for (const [name, names] of Object.entries(CONTROLS)) {
    for (const [key, id] of Object.entries(names)) {
      setIn(id, (name === section ? view.get(key) : null) ?? defaults[id]);
    }
    SHOW[name]();
  }
  const column = section === "labels" ? Number(view.get("sort") ?? -1) : -1;
  if (sorted.tHead.rows[0].cells[column]) sortBy(sorted, column, view.get("rises") === "yes");
  else {
    for (const cell of sorted.tHead.rows[0].cells) cell.removeAttribute("aria-sort");
    sorted.tBodies[0].append(...unsorted);
  }
  if (isBack && cameFrom && section !== "messages") {
    cameFrom.focus();
    cameFrom = null;
    byId("message-back").hidden = true;
  } else if (words && byId(section)) byId(section).scrollIntoView();
}

for (const [section, names] of Object.entries(CONTROLS)) {
  for (const id of Object.values(names)) {
    byId(id).addEventListener("input", () => {
      SHOW[section]();
      keepView(section, false);
    });
  }
}
addEventListener("popstate", () => showView(true));

for (const id of ["matrix-controls", "message-controls", "threshold-controls"]) {
  if (!byId(id)) continue;
  byId(id).hidden = false;
  byId(id).addEventListener("submit", (event) => event.preventDefault());
}
for (const note of document.querySelectorAll(".js")) note.hidden = false;
showView(false);
