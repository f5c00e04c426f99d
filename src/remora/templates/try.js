"use strict";
const at = (id) => document.getElementById(id);
const made = (name, text, kind) => {
  const node = document.createElement(name);
  node.textContent = text;
  if (kind) node.className = kind;
  return node;
};

async function call(path, body) {
  const headers = { "content-type": "application/json" };
  if (at("token").value) headers.authorization = `Bearer ${at("token").value}`;
  const options = body ? { method: "POST", body: JSON.stringify(body), headers } : { headers };
  const answer = await fetch(path, options);
  if (answer.status === 401) at("secret").hidden = false;
  const content = await answer.json();
  if (!answer.ok) throw new Error(content.error);
  return content;
}

let adapters = [];
async function listAdapters() {
  ({ adapters } = await call("/v1/adapters"));
  at("adapter").replaceChildren(...adapters.map((one) => new Option(one.id, one.id)));
  at("which").hidden = adapters.length < 2;
  showFields();
}

// One field for each text column of the adapter, where there are several.

let columns = [];
const fields = () => [...at("message").querySelectorAll("textarea")];
function showFields() {
  const { text_columns: names } = adapters[at("adapter").selectedIndex];
  const wanted = names.length > 1 ? names : [];
  if (JSON.stringify(wanted) === JSON.stringify(columns)) return;
  columns = wanted;
  const [first] = fields();
  const isTyping = document.activeElement === first;
  at("message").replaceChildren();
  for (const [k, name] of (columns.length ? columns : ["Message"]).entries()) {
    const label = made("label", name);
    const field = document.createElement("textarea");
    label.htmlFor = field.id = k ? `text-${k}` : "text";
    field.rows = columns.length ? 2 : 3;
    field.required = !columns.length;
    field.value = k ? "" : first.value;
    at("message").append(label, field);
  }
  if (isTyping) at("text").focus();
}

function message() {
  const given = fields().map((field) => field.value);
  return columns.length ? Object.fromEntries(columns.map((name, k) => [name, given[k]])) : given[0];
}

async function classify(event) {
  event.preventDefault();
  const began = performance.now();
  const shown = at("answer");
  try {
    if (!adapters.length) await listAdapters();
    const { id: adapter, num_labels: most } = adapters[at("adapter").selectedIndex];
    const body = { texts: [message()], top_k: Math.min(3, most), adapter };
    const answer = await call("/v1/classify", body);
    const list = document.createElement("ol");
    for (const { label, probability } of answer.results[0].labels) {
      const row = document.createElement("li");
      const name = made("div", "", "name");
      name.append(made("span", label), made("span", `${(100 * probability).toFixed(1)} %`));
      const bar = document.createElement("meter");
      bar.value = probability;
      bar.setAttribute("aria-label", label);
      row.append(name, bar);
      list.append(row);
    }
    const milliseconds = Math.round(performance.now() - began);
    const told = `by ${answer.adapter} (${answer.sha256.slice(0, 12)}), ${milliseconds} ms`;
    shown.replaceChildren(list, made("p", told, "note"));
  } catch (error) {
    shown.replaceChildren(made("p", error.message, "problem"));
  }
}

at("ask").addEventListener("submit", classify);
at("adapter").addEventListener("change", showFields);
at("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("ask").requestSubmit();
});
listAdapters().catch(() => {});
at("text").focus();
