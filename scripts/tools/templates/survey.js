"use strict";
// State: {rater, at, answers: {item: {emotion, left, right}}}, kept in localStorage under the survey's id after each change.
// Screens: start; for each item "read" (question 1, no clip) and "watch" (questions 2 and 3); end.
const { survey, items } = JSON.parse(document.getElementById("data").textContent);
const STORE = "erv-min-survey-" + survey;
const SCALE = ["Does not reflect the emotion in the video at all", "Poorly reflects the emotion in the video",
  "Somewhat reflects the emotion in the video", "Reflects the emotion in the video well",
  "Reflects the emotion in the video very well"];
const page = document.getElementById("page");
let state = { rater: "", at: 0, answers: {} };
let kept = true;
try {
  const found = JSON.parse(localStorage.getItem(STORE) || "null");
  if (found && typeof found.answers === "object") state = found;
} catch (error) { kept = false; console.warn("kept answers cannot be read: " + error.message); }

function save() {
  try { localStorage.setItem(STORE, JSON.stringify(state)); kept = true; } catch (error) { kept = false; }
}

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function answered() {
  return items.reduce((sum, item) => sum + Object.keys(state.answers[item.id] || {}).length, 0);
}

function progress() {
  const total = 3 * items.length, done = answered();
  document.getElementById("done").style.width = (100 * done / total) + "%";
  const bar = document.querySelector(".progress");
  bar.setAttribute("aria-valuenow", done);
  bar.setAttribute("aria-valuemax", total);
  document.getElementById("partial").hidden = !state.rater || state.at < 1 || state.at > 2 * items.length;
  document.getElementById("count").textContent = state.rater ? `${done} of ${total} questions answered` : "";
}

function question(item, name, legend, options, scale) {
  const box = element("div", { className: scale ? "choices scale" : "choices" });
  for (const [value, words] of options) {
    const input = element("input", { type: "radio", name: `${item.id}-${name}`, value });
    input.checked = (state.answers[item.id] || {})[name] === value;
    input.addEventListener("change", () => {
      (state.answers[item.id] ||= {})[name] = value;
      save();
      progress();
      ready();
    });
    box.append(element("label", {}, input, ...(scale ? [element("b", {}, String(value))] : []), element("span", {}, words)));
  }
  return element("fieldset", { id: `${item.id}-${name}` }, element("legend", {}, legend), box);
}

function needed() {  // the questions of the screen in view
  const item = items[(state.at - 1) >> 1];
  return state.at < 1 || !item ? [] : state.at % 2 ? [[item, "emotion"]] : [[item, "left"], [item, "right"]];
}

function ready() {
  const next = document.getElementById("next");
  if (next) next.disabled = !needed().every(([item, name]) => name in (state.answers[item.id] || {}));
}

function go(at) {
  state.at = at;
  save();
  show();
  window.scrollTo(0, 0);
  page.focus({ preventScroll: true });
}

function steps(next) {
  const row = element("div", { className: "steps" });
  row.append(element("button", { type: "button", id: "back", className: "quiet", onclick: () => go(state.at - 1) }, "Back"));
  if (next) row.append(element("button", { type: "button", id: "next", onclick: () => go(state.at + 1) }, "Next"));
  return row;
}

function show() {
  page.replaceChildren();
  if (!kept) page.append(element("p", { className: "warn" },
    "This browser does not keep answers when the page is closed: save them as a file before you leave."));
  const number = (state.at - 1) >> 1, item = items[number];
  if (!state.rater || state.at < 1) {
    page.append(document.getElementById("start").content.cloneNode(true));
    document.getElementById("rater").value = state.rater;
    document.getElementById("who").addEventListener("submit", (event) => {
      event.preventDefault();
      state.rater = document.getElementById("rater").value.trim();
      if (state.rater) go(1);
    });
  } else if (!item) {
    page.append(document.getElementById("end").content.cloneNode(true), steps(false));
    const left = 3 * items.length - answered();
    document.getElementById("left").textContent = left ? `${left} questions are not answered yet.` : "All questions are answered.";
    document.getElementById("export").addEventListener("click", download);
    document.getElementById("clear").addEventListener("click", () => {
      if (!confirm("Delete all answers from this browser? Saved files stay.")) return;
      state = { rater: "", at: 0, answers: {} };
      try { localStorage.removeItem(STORE); } catch (error) { kept = false; }
      show();
    });
  } else if (state.at % 2) {
    page.append(element("h2", {}, `Clip ${number + 1} of ${items.length}`), element("blockquote", {}, item.emotion_text),
      question(item, "emotion", "What emotion does the explanation represent?", item.choices.map((c) => [c, c]), false),
      steps(true));
  } else {
    const video = element("video", { src: item.clip, controls: true, playsInline: true, preload: "auto" });
    video.addEventListener("error", () => video.replaceWith(element("p", { className: "warn" },
      "The clip cannot be played here. Please tell the person who invited you, and go on with another browser.")));
    page.append(element("h2", {}, `Clip ${number + 1} of ${items.length}`), video);
    const scale = SCALE.map((words, i) => [i + 1, words]).reverse();
    const pair = element("div", { className: "pair" });
    for (const side of ["left", "right"]) {
      pair.append(element("section", {}, element("blockquote", {}, item[side]),
        question(item, side, "How well does this explanation reflect the emotion in the video?", scale, true)));
    }
    page.append(pair, steps(true));
  }
  progress();
  ready();
}

function download() {
  const content = JSON.stringify({ survey, rater: state.rater, complete: answered() === 3 * items.length,
    saved: new Date().toISOString(), answers: state.answers }, null, 1);
  const name = `survey-${survey}-${state.rater.replace(/[^\p{L}\p{N}_-]+/gu, "_")}.json`;
  const url = URL.createObjectURL(new Blob([content], { type: "application/json" }));
  const link = element("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

document.getElementById("partial").addEventListener("click", download);

show();
