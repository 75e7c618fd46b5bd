"use strict";
// Everything that comes from the data is put into the page as text, never as HTML.

const KEYS = { 1: "left", ArrowLeft: "left", 2: "right", ArrowRight: "right", 3: "tie", " ": "tie", s: "skip", f: "flag" };
const AGAIN_MS = 3000;
const $ = (id) => document.getElementById(id);

// The token comes behind the link's #, and stays with this tab; the address bar forgets it.
if (location.hash.length > 1) {
  sessionStorage.setItem("token", location.hash.slice(1));
  history.replaceState(null, "", location.pathname);
}
const token = sessionStorage.getItem("token") || "";
let pair = null;
let busy = false;
let later = 0;

async function call(name, body) {
  const answer = await fetch(`api/${name}`, {
    method: "POST",
    headers: { "Content-Type": "application/json", Authorization: `Bearer ${token}` },
    body: JSON.stringify(body),
  });
  const said = await answer.json().catch(() => ({ error: `the server answered ${answer.status}` }));
  if (!answer.ok) throw new Error(said.error);
  return said;
}

function block(role, text) {
  const turn = document.createElement("div");
  turn.className = "turn";
  const head = document.createElement("span");
  head.className = "role";
  head.textContent = role;
  const body = document.createElement("div");
  body.className = text ? "text" : "text empty";
  body.textContent = text || "(empty)";
  turn.append(head, body);
  return turn;
}

const content = (turn) => (typeof turn.content === "string" ? turn.content : JSON.stringify(turn.content, null, 1));

function show(said) {
  pair = said.pair;
  document.title = `${said.labels}/${said.wanted} · Which answer is better?`;
  $("title").textContent = said.title;
  $("who").textContent = said.annotator;
  $("bar").max = said.wanted;
  $("bar").value = Math.min(said.labels, said.wanted);
  $("count").textContent = `${said.labels} of ${said.wanted} labels, ${said.own} by you`;
  $("work").hidden = !pair;
  $("undo").disabled = $("undo-last").disabled = !said.own;
  $("undo-last").hidden = Boolean(pair) || said.done;
  $("message").className = "";
  clearTimeout(later);
  if (!pair) {
    $("message").textContent = said.done
      ? "All labels are there. Thank you."
      : "There is no pair for you now; this page looks again by itself.";
    if (!said.done) later = setTimeout(() => act("next", {}), AGAIN_MS);
    return;
  }
  $("message").textContent = said.undone ? "Taken back; judge this pair again." : "";
  const turns = typeof pair.prompt === "string" ? [{ role: "prompt", content: pair.prompt }] : pair.prompt;
  $("prompt").replaceChildren(...turns.map((turn) => block(turn.role, content(turn))));
  $("left").replaceChildren(...block("answer on the left", pair.left).childNodes);
  $("right").replaceChildren(...block("answer on the right", pair.right).childNodes);
  if (document.activeElement) document.activeElement.blur();
  window.scrollTo(0, 0);
}

async function act(name, body) {
  if (busy) return;
  busy = true;
  try {
    show(await call(name, body));
    if (name !== "next") $("comment").value = "";
  } catch (error) {
    $("message").className = "error";
    $("message").textContent = `${error.message}. What you judged before is kept.`;
    if (!pair && token) later = setTimeout(() => act("next", {}), AGAIN_MS);
  } finally {
    busy = false;
  }
}

const judge = (choice) => pair && act("judge", { pair: pair.id, choice, comment: $("comment").value });
const undo = () => act("undo", {});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (event.target === $("comment")) {
    if (event.key === "Escape") $("comment").blur();
    return;
  }
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (key in KEYS) judge(KEYS[key]);
  else if (key === "u") undo();
  else if (key === "c") $("comment").focus();
  else return;
  event.preventDefault();
});
for (const button of document.querySelectorAll("[data-choice]")) {
  button.addEventListener("click", () => judge(button.dataset.choice));
}
$("undo").addEventListener("click", undo);
$("undo-last").addEventListener("click", undo);

if (token) act("next", {});
else {
  $("message").className = "error";
  $("message").textContent = "Open the link that was made for you: it ends in # and your token.";
}
