"use strict";
async function send(event) {
  event.preventDefault();
  const form = event.target;
  const headers = { "content-type": "application/json" };
  const token = document.getElementById("token").value;
  if (token) headers.authorization = `Bearer ${token}`;
  const shown = form.querySelector("output");
  try {
    const body = form.querySelector("textarea").value;
    const answer = await fetch(form.dataset.path, { method: "POST", headers, body });
    shown.textContent = `${answer.status}\n${JSON.stringify(await answer.json(), null, 2)}`;
  } catch (error) {
    shown.textContent = error.message;
  }
}
for (const form of document.querySelectorAll("form")) form.addEventListener("submit", send);
