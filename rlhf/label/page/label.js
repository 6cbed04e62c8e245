// Keys for the page's buttons, and sending a vote again while the server is down. Everything else works without
// this script, by Tab and Enter.
"use strict";

const KEYS = {
  ArrowLeft: "left", 1: "left",
  ArrowRight: "right", 2: "right",
  t: "tie",
  x: "both_bad",
  s: "skip",
};
const STORED = "rlhf-label-keys";
const RETRY_MILLISECONDS = 2000;

let form, undo, comment, toggle;
let isSent = false; // a second key press before the next page is not a second vote

function stored() {
  try {
    return localStorage.getItem(STORED);
  } catch { // a browser that saves nothing
    return null;
  }
}

function store(value) {
  try {
    localStorage.setItem(STORED, value);
  } catch { // the choice holds for this page alone
  }
}

function press(value) {
  const button = form.querySelector(`button[value="${value}"]`);
  form.requestSubmit(button);
}

function onKey(event) {
  if (event.ctrlKey || event.altKey || event.metaKey || event.isComposing || event.repeat) return;
  if (event.target === comment) {
    if (event.key === "Escape") comment.blur();
    return;
  }
  if (!toggle.checked) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (key === "c") {
    event.preventDefault();
    comment.focus();
  } else if (key === "u") {
    event.preventDefault();
    undo.requestSubmit();
  } else if (Object.hasOwn(KEYS, key)) {
    event.preventDefault();
    press(KEYS[key]);
  }
}

async function onSubmit(event) {
  event.preventDefault();
  if (isSent) return;
  isSent = true;
  const body = new URLSearchParams(new FormData(event.target));
  if (event.submitter?.name) body.append(event.submitter.name, event.submitter.value);
  for (;;) {
    let message = "The server does not answer.";
    try {
      const response = await fetch(event.target.action, { method: "POST", body });
      const text = await response.text();
      if (response.status < 429) {
        show(text);
        return;
      }
      message = parsed(text).querySelector("main p, body")?.textContent ?? message;
    } catch { // no connection; a vote that is sent several times counts once
    }
    notice(`${message} What you did is kept on this page, and is sent again until it is saved.`);
    await new Promise((done) => { setTimeout(done, RETRY_MILLISECONDS); });
  }
}

function parsed(text) {
  return new DOMParser().parseFromString(text, "text/html");
}

function show(text) {
  const page = parsed(text);
  document.title = page.title;
  document.body.replaceWith(page.body);
  scrollTo(0, 0);
  focus(document.querySelector("[autofocus]") ?? document.querySelector("h1"));
  setUp();
}

function notice(text) {
  let place = document.querySelector(".notice");
  if (!place) {
    place = document.createElement("p");
    place.className = "notice";
    place.setAttribute("role", "status");
    document.querySelector("h1").after(place);
  }
  if (place.textContent !== text) {
    place.textContent = text;
    focus(place);
  }
}

function focus(element) { // so that it is read aloud
  if (!element) return;
  element.tabIndex = -1;
  element.focus();
}

function setUp() {
  form = document.getElementById("vote");
  isSent = false;
  if (!form) return;
  undo = document.getElementById("undo");
  comment = document.getElementById("comment");
  toggle = document.getElementById("use-keys");
  document.getElementById("keys").hidden = false;
  toggle.checked = stored() !== "off";
  toggle.addEventListener("change", () => store(toggle.checked ? "on" : "off"));
  form.addEventListener("submit", onSubmit);
  undo.addEventListener("submit", onSubmit);
}

setUp();
document.addEventListener("keydown", (event) => { if (form) onKey(event); });
