// Keys for the buttons that are on the page anyway. Without this script everything works, by Tab and Enter.
"use strict";

const KEYS = {
  ArrowLeft: "left", 1: "left",
  ArrowRight: "right", 2: "right",
  t: "tie",
  x: "both_bad",
  s: "skip",
};
const STORED = "rlhf-label-keys";

const form = document.getElementById("vote");
const undo = document.getElementById("undo");
const comment = document.getElementById("comment");
const toggle = document.getElementById("use-keys");
let isSent = false; // a second key before the next page comes is no second vote

function stored() {
  try {
    return localStorage.getItem(STORED);
  } catch { // a browser that keeps nothing
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

function onSubmit(event) {
  if (isSent) event.preventDefault();
  isSent = true;
}

if (form) {
  document.getElementById("keys").hidden = false;
  toggle.checked = stored() !== "off";
  toggle.addEventListener("change", () => store(toggle.checked ? "on" : "off"));
  document.addEventListener("keydown", onKey);
  form.addEventListener("submit", onSubmit);
  undo.addEventListener("submit", onSubmit);
  window.addEventListener("pageshow", () => { isSent = false; });
}
