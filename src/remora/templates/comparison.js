// Messages of the two runs in parts, and links from a label to its messages.

const names = ["first", "second"];
const lists = names.map((name) => byId(`messages-${name}`));
const field = byId("message-label");
let cameFrom = null;  // the button that led to the messages shown

function chosen(k) {
  return data.lists[k].filter((each) => field.value === "" || each.label === Number(field.value));
}

function showMore(k) {
  const isMore = addMessages(lists[k], byId("message"), chosen(k), (item, each) => fillSlots(item, {
    text: each.text,
    label: data.labels[each.label],
    right: percent(each.right),
    predicted: data.labels[each.predicted],
    wrong: percent(each.wrong),
    row: each.row.toLocaleString("en"),
  }));
  byId(`more-${names[k]}`).hidden = !isMore;
}

function showMessages() {
  lists.forEach((list, k) => {
    list.replaceChildren();
    showMore(k);
    const count = chosen(k).length;
    byId(`status-${names[k]}`).textContent = `${count.toLocaleString("en")} ${count === 1 ? "message" : "messages"}`;
  });
}

function showLabel(place, section, from) {
  field.value = place;
  showMessages();
  cameFrom = from;
  byId("message-back").hidden = false;
  history.pushState(null, "", addressOf());
  byId(section).focus({preventScroll: true});
  byId(section).scrollIntoView();
}

// The label that is chosen stands in the address, so that it can be linked, and Back works.

function addressOf() {
  const view = new URLSearchParams({label: data.labels[field.value]});
  return field.value === "" ? "#messages" : `#messages?${view}`;
}

function showView(isBack) {
  const [section, words] = location.hash.slice(1).split("?");
  const place = data.labels.indexOf(new URLSearchParams(words ?? "").get("label"));
  field.value = place === -1 ? "" : place;
  showMessages();
  if (isBack && cameFrom && section !== "messages") {
    cameFrom.focus();
    cameFrom = null;
    byId("message-back").hidden = true;
  } else if (words && byId(section)) byId(section).scrollIntoView();
}

if (data) {
  addLabels(field);
  names.forEach((name, k) => byId(`more-${name}`).addEventListener("click", () => showMore(k)));
  field.addEventListener("input", () => {
    showMessages();
    history.replaceState(null, "", addressOf());
  });
  byId("message-back").addEventListener("click", () => history.back());
  addEventListener("popstate", () => showView(true));
  const controls = byId("message-controls");
  controls.hidden = false;
  controls.addEventListener("submit", (event) => event.preventDefault());
  const table = byId("label-table");
  makeSortable(table, () => {});
  for (const row of table.tBodies[0].rows) {
    const place = row.dataset.label;
    addButton(row.querySelector("th"), "Show the messages", (button) => showLabel(place, "messages-heading", button));
    for (const name of names) {
      const cell = row.querySelector(`.only-${name}`);
      if (cell.textContent !== "0") addButton(cell, "Show these messages", (button) => showLabel(place, `heading-${name}`, button));
    }
  }
  for (const note of document.querySelectorAll(".js")) note.hidden = false;
  showView(false);
}
