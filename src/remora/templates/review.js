"use strict";
const at = (id) => document.getElementById(id);
const made = (name, text = "", kind = "") => {
  const node = document.createElement(name);
  node.textContent = text;
  if (kind) node.className = kind;
  return node;
};
const percent = (share) => `${share < 0.01 ? "under 1" : share > 0.99 ? "over 99" : Math.round(100 * share)} %`;
// A label's name, which may break after each of its parts
const named = (label, kind = "") => {
  const node = made("bdi", "", kind);
  for (const part of label.split(/(?<=[_./-])/)) node.append(part, document.createElement("wbr"));
  return node;
};
const rows = (count) => `${count.toLocaleString("en")} row${count === 1 ? "" : "s"}`;
const MOST_SHOWN = 8;
const REST_SECONDS = 60; // a longer wait is no work

let labels = [], bands = [], items = [], summary = {}, canDelete = true, several = false;
let current = null, withDoubtful = false;
const skipped = new Set(), done = [], times = [], kept = new Map();

async function call(path, body) {
  const options = body ? { method: "POST", body: JSON.stringify(body), headers: { "content-type": "application/json" } } : {};
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("The review has ended, and what was decided is saved. To go on, run it again: " + (summary.again || "remora review RUN"));
  }
  const content = await answer.json();
  if (!answer.ok) throw new Error(content.error);
  return content;
}

function complain(error) {
  at("problem").textContent = error.message;
  at("problem").hidden = false;
}

const isOpen = (item) => item.decision === null;
const isListed = (item) => withDoubtful || item.band !== bands.at(-1) || !isOpen(item);
const listed = () => items.filter(isListed);
const waiting = () => listed().filter((item) => isOpen(item) && !skipped.has(item.row));

// One row

function details(item) {
  if (!kept.has(item.row)) {
    const asked = call(`rows/${item.row}`);
    asked.catch(() => kept.delete(item.row));
    kept.set(item.row, asked);
  }
  return kept.get(item.row);
}

async function show(item) {
  current = item;
  at("asking").hidden = false;
  at("ending").hidden = true;
  showProgress();
  const found = await details(item);
  if (current !== item) return;
  showBatch(item);
  at("message").textContent = found.text;
  at("message").scrollTop = 0;
  at("message").classList.toggle("long", found.text.length > 280);
  showChoice(at("keep"), item.label, found.p_label);
  showChoice(at("accept"), item.suggested, found.p_suggested);
  at("accept").hidden = item.suggested === null;
  at("delete").hidden = !canDelete;
  showOthers(item, found);
  showWhy(item, found);
  at("other").value = "";
  showMatches([]);
  window.scrollTo(0, 0);
  const next = waiting().find((each) => each !== item);
  if (next) details(next).catch(() => {});
}

function showBatch(item) {
  const batch = listed().filter((each) => each.pair === item.pair && each.band === item.band);
  const band = made("strong", item.band[0].toUpperCase() + item.band.slice(1), item.band === bands[0] ? "sure" : "");
  const pair = made("span");
  pair.append(named(item.label), " or ", named(item.suggested ?? "another"));
  at("batch").replaceChildren(band, pair);
  if (batch.length > 1) at("batch").append(made("span", `${batch.indexOf(item) + 1} of ${batch.length}`));
}

function showChoice(button, label, share) {
  button.querySelector("bdi").replaceWith(named(label ?? ""));
  button.querySelector(".share").textContent = share === null ? "" : `judges: ${percent(share)}`;
  const decision = current.decision;
  button.classList.toggle("chosen", decision !== null && decision.label === label && !decision.delete);
}

function showOthers(item, found) {
  const names = new Set(found.neighbours.map((each) => each.label));
  for (const name of [item.label, item.suggested, null]) names.delete(name);
  at("others").replaceChildren(...[...names].slice(0, 3).map((name, place) => {
    const button = made("button");
    button.append(named(name), " ", made("kbd", String(place + 1)));
    button.addEventListener("click", () => decide(name));
    return button;
  }));
}

const noun = () => (several ? "labels" : "label");

function showWhy(item, found) {
  const lines = [];
  const line = (...parts) => {
    const node = made("li");
    node.append(...parts);
    lines.push(node);
  };
  if (found.p_label !== null && item.suggested !== null) {
    line(`Judges that did not see the ${noun()} give `, named(item.label), ` ${percent(found.p_label)} and `, named(item.suggested), ` ${percent(found.p_suggested)}.`);
  }
  const same = found.neighbours.filter((each) => each.label === item.suggested).length;
  const own = found.neighbours.filter((each) => each.label === item.label).length;
  line(`Of the ${found.neighbours.length} nearest texts, ${same} ${same === 1 ? "has" : "have"} the suggested ${noun()}, ${own} the given.`);
  for (const each of found.neighbours) {
    if (each.is_near && each.label !== item.label && each.label !== null) line(`Row ${each.row} is nearly the same text, with the ${noun()} `, named(each.label), ".");
  }
  if (found.p_wrong !== null) {
    const wrong = several ? "The most doubtful label is wrong, or missing," : "The label is wrong";
    line(found.p_wrong >= 0.5 ? `${wrong} with a probability of ${percent(found.p_wrong)}.` : `${wrong} with a probability of ${percent(found.p_wrong)} only; it is listed because of the above.`);
  }
  at("why").replaceChildren(...lines);
  at("near").replaceChildren(...found.neighbours.map((each) => {
    const node = made("li");
    const kind = each.label === item.suggested ? "to" : each.label === item.label ? "as" : "";
    const text = made("p", each.text);
    text.dir = "auto";
    node.append(named(each.label ?? "deleted", `tag ${kind}`), text);
    return node;
  }));
}

function showProgress() {
  const all = listed(), open = all.filter(isOpen).length;
  at("bar").max = Math.max(1, all.length);
  at("bar").value = all.length - open;
  at("count").textContent = `${(all.length - open).toLocaleString("en")} of ${all.length.toLocaleString("en")}`;
  const recent = times.slice(-20);
  const seconds = (recent.reduce((sum, each) => sum + each, 0) / recent.length) * open;
  at("left").textContent = recent.length < 3 || !open ? "" : seconds < 60 ? "under a minute left" : `about ${Math.round(seconds / 60)} min left`;
  at("undo").disabled = !done.length;
}

// Deciding. A key that comes before the next row is shown is not meant for it, so it is dropped.

let isBusy = false, shownAt = performance.now();

async function act(work) {
  if (isBusy) return;
  isBusy = true;
  try {
    await work();
  } catch (error) {
    complain(error);
  } finally {
    isBusy = false;
  }
}

async function save(item, decision) {
  summary = await call("decisions", { row: item.row, label: decision?.label ?? null, delete: decision?.delete ?? false });
  item.decision = summary.decision; // a set of labels as the table writes it
  kept.clear(); // neighbours are shown with the labels that they have now
  at("problem").hidden = true;
}

const decide = (label, remove = false) => act(async () => {
  const item = current;
  if (!item || (label === null && !remove)) return;
  const before = item.decision;
  await save(item, { label: remove ? null : label, delete: remove });
  label = item.decision.label;
  times.push(Math.min(REST_SECONDS, (performance.now() - shownAt) / 1000));
  done.push({ item, before });
  skipped.delete(item.row);
  say(remove ? "Deleted." : label === item.label ? `Kept ${label}.` : `Now ${label}.`);
  await goOn();
});

const skip = () => act(async () => {
  if (!current) return;
  skipped.add(current.row);
  say("Skipped.");
  await goOn();
});

const undo = () => act(async () => {
  const last = done.pop();
  if (!last) return;
  await save(last.item, last.before);
  say("Undone.");
  shownAt = performance.now();
  await show(last.item);
});

async function goOn() {
  shownAt = performance.now();
  const next = waiting()[0];
  if (next) await show(next);
  else showEnd();
}

function say(text) {
  const open = listed().filter(isOpen).length;
  at("said").textContent = `${text} ${rows(open)} left.`;
}

// Another label, by typing

let matches = [], marked = 0;

function found(text) {
  const wanted = text.trim().toLowerCase();
  if (!wanted) return [];
  const rank = (label) => {
    const name = label.toLowerCase();
    if (name === wanted) return 0;
    if (name.startsWith(wanted)) return 1;
    if (name.split(/[^\p{L}\p{N}]+/u).some((word) => word.startsWith(wanted))) return 2;
    return name.includes(wanted) ? 3 : 4;
  };
  const matching = labels.filter((label) => rank(label) < 4).sort((a, b) => rank(a) - rank(b)).slice(0, MOST_SHOWN);
  // Any set of labels may be written; the server says what is none
  return several && !matching.includes(text.trim()) ? [...matching, text.trim()] : matching;
}

function showMatches(names, place = 0) {
  [matches, marked] = [names, place];
  at("matches").replaceChildren(...names.map((name, i) => {
    const option = made("li", name);
    option.id = `match-${i}`;
    option.setAttribute("role", "option");
    option.setAttribute("aria-selected", String(i === place));
    option.addEventListener("mousedown", (event) => { event.preventDefault(); choose(name); });
    return option;
  }));
  at("matches").hidden = !names.length;
  at("other").setAttribute("aria-expanded", String(names.length > 0));
  if (names.length) at("other").setAttribute("aria-activedescendant", `match-${place}`);
  else at("other").removeAttribute("aria-activedescendant");
}

function choose(name) {
  at("other").blur();
  showMatches([]);
  decide(name);
}

at("other").addEventListener("input", () => showMatches(found(at("other").value)));
at("other").addEventListener("blur", () => showMatches([]));
at("other").addEventListener("keydown", (event) => {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (step && matches.length) {
    showMatches(matches, (marked + step + matches.length) % matches.length);
    event.preventDefault();
  } else if (event.key === "Enter" && matches.length) {
    event.preventDefault();
    choose(matches[marked]);
  } else if (event.key === "Escape") {
    at("other").value = "";
    at("other").blur();
  }
  event.stopPropagation();
});

// The end

function showEnd() {
  current = null;
  at("asking").hidden = true;
  at("ending").hidden = false;
  showProgress();
  const all = items.filter((item) => !isOpen(item));
  const left = listed().filter(isOpen).length;
  at("outcome").textContent = left ? `${rows(left)} left to decide` : items.length ? "All decided" : "Nothing to decide";
  at("tiles").replaceChildren(...[["relabelled", summary.num_relabelled], ["kept", summary.num_kept], ["deleted", summary.num_deleted], ["left", left]].flatMap(([name, count]) => [made("dt", name), made("dd", count.toLocaleString("en"))]).reduce((boxes, node, i) => {
    if (i % 2 === 0) boxes.push(made("div"));
    boxes.at(-1).append(node);
    return boxes;
  }, []));
  const buttons = [];
  const offer = (text, action, kind = "") => {
    const button = made("button", text, kind);
    button.addEventListener("click", action);
    buttons.push(button);
  };
  if (left) offer(skipped.size ? `Go on with ${rows(left)}, the skipped ones too` : `Go on with ${rows(left)}`, () => { skipped.clear(); act(goOn); }, "main");
  const doubtful = items.filter((item) => isOpen(item) && !isListed(item)).length;
  if (doubtful) offer(`Look at ${rows(doubtful)} more that ${doubtful === 1 ? "is" : "are"} probably right`, () => { withDoubtful = true; act(goOn); });
  if (done.length) offer("Undo the last decision", undo);
  at("going-on").replaceChildren(...buttons);
  at("next").hidden = !all.length;
  at("end").className = left ? "plain" : "main";
  at("command").textContent = summary.next;
  at("decided").replaceChildren(...all.map((item) => {
    const line = made("li"), text = made("p");
    if (item.decision.delete) text.append(named(item.label), ", deleted");
    else if (item.decision.label === item.label) text.append(named(item.label), ", kept");
    else text.append(named(item.label), " → ", named(item.decision.label));
    const message = made("bdi", item.excerpt, "note");
    text.append(document.createElement("br"), message);
    const button = made("button", "Change", "plain");
    button.setAttribute("aria-label", `Change row ${item.row}`);
    button.addEventListener("click", () => act(() => { shownAt = performance.now(); return show(item); }));
    line.append(text, button);
    return line;
  }));
  window.scrollTo(0, 0);
  at("outcome").focus();
}

async function endReview() {
  await call("end", {});
  at("ending").replaceChildren(made("h2", "The review has ended"), made("p", "Everything decided is saved. You can close this page."));
  at("finish").hidden = true;
}

// Buttons and keys

at("keep").addEventListener("click", () => decide(current?.label));
at("accept").addEventListener("click", () => decide(current?.suggested));
at("delete").addEventListener("click", () => decide(null, true));
at("skip").addEventListener("click", skip);
at("undo").addEventListener("click", undo);
at("finish").addEventListener("click", () => act(async () => showEnd()));
at("end").addEventListener("click", () => act(endReview));
at("copy").addEventListener("click", async () => {
  await navigator.clipboard.writeText(at("command").textContent);
  at("copy").textContent = "Copied";
});

const KEYS = { k: "keep", ArrowLeft: "keep", a: "accept", ArrowRight: "accept", d: "delete", s: "skip", u: "undo" };
document.addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && event.key === "z" && !at("asking").hidden) {
    event.preventDefault();
    undo();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey || !at("keys").checked || at("asking").hidden) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const button = KEYS[key] ? at(KEYS[key]) : /^[1-3]$/.test(key) ? at("others").children[key - 1] : null;
  if (button && !button.hidden && !event.repeat) {
    event.preventDefault();
    button.click();
  } else if (key === "o") {
    event.preventDefault();
    at("other").focus();
  }
});

act(async () => {
  const all = await call("rows");
  ({ labels, bands, items, summary } = all);
  [canDelete, several] = [all.can_delete, all.multi_label];
  if (several && items.length) at("other").placeholder = `all labels, such as ${items[0].label}`;
  at("run").textContent = summary.run;
  await goOn();
});
