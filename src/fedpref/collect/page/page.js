"use strict";
// A choice is sent with an address of its own until the server says that it is on the disk: sent
// twice, it is written once.
const at = (id) => document.getElementById(id);
let rater = "", item = null, since = 0, busy = false, editing = "", edits = true, timer = 0;

async function ask(what, content) {
  const response = await fetch(`api/${what}`, {
    method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(content),
  });
  const answer = await response.json();
  if (answer.again) throw new TypeError(answer.again);
  if (!response.ok) {
    const other = response.status === 403 ? " Open the address that the command prints now." : "";
    throw new Error((answer.refused || response.statusText) + "." + other);
  }
  return answer;
}

function note(text, wrong = false) {
  at("note").textContent = text;
  at("note").classList.toggle("wrong", wrong);
}

async function until(what, content) {
  // the server may be gone for a moment, and comes back at the same address or not at all
  for (;;) {
    try {
      return await ask(what, content);
    } catch (error) {
      if (!(error instanceof TypeError || error instanceof SyntaxError)) throw error;
      note("Not written down yet: it is sent again until it is. " + error.message, true);
      await new Promise((done) => setTimeout(done, 1000));
    }
  }
}

function time(seconds) {
  if (seconds === null || seconds === undefined) return "";
  if (seconds < 90) return "about a minute left";
  if (seconds < 5400) return `about ${Math.round(seconds / 60)} minutes left`;
  return `about ${Math.round(seconds / 3600)} hours left`;
}

function show(state) {
  clearTimeout(timer);
  editing = "";
  at("where").hidden = false;
  at("progress").max = Math.max(1, state.total);
  at("progress").value = state.done;
  at("count").textContent = [`${state.done} of ${state.total}`, time(state.seconds_left)].filter(Boolean).join(" · ");
  at("rater").textContent = state.rater;
  at("undo").hidden = !state.can_undo;
  item = state.item || null;
  at("item").hidden = !item;
  if (!item) {
    if (state.failure) note(`No more answers can be drawn: ${state.failure}`, true);
    else if (state.waiting) {
      note("Answers are being drawn; the next two appear here.");
      timer = setTimeout(next, 400);
    } else {
      const alike = state.alike ? ` ${state.alike} prompts left nothing to choose between.` : "";
      note(`That was all. Thank you; you can close this page.${alike}`);
    }
    return;
  }
  note("");
  const prompt = at("prompt");
  prompt.replaceChildren();
  for (const turn of item.prompt) {
    if (turn.role && item.prompt.length > 1) {
      const role = document.createElement("p");
      role.className = "role";
      role.textContent = turn.role;
      prompt.append(role);
    }
    const said = document.createElement("p");
    said.textContent = turn.text;
    prompt.append(said);
  }
  at("question").textContent = item.question;
  for (const side of ["left", "right"]) {
    at(side).textContent = item[side] || "(no answer)";
    at(side).hidden = false;
    at(`${side}-edit`).hidden = true;
    document.querySelector(`[data-edit=${side}]`).hidden = !edits;
    document.querySelector(`[data-edit=${side}]`).textContent = "Edit";
  }
  since = performance.now();
  at("question").focus({ preventScroll: true });
  window.scrollTo(0, 0);
}

async function next() {
  await doing(async () => show(await until("next", { rater })));
}

async function doing(what) {
  if (busy) return;
  busy = true;
  for (const button of document.querySelectorAll("button")) button.disabled = true;
  try {
    await what();
  } catch (error) {
    note(error.message, true);
  } finally {
    busy = false;
    for (const button of document.querySelectorAll("button")) button.disabled = false;
  }
}

function address() {
  // randomUUID is there on loopback, which counts as secure
  return crypto.randomUUID();
}

function choose(shown, edited) {
  if (!item) return;
  const content = {
    address: address(), rater, item: item.number, name: item.name, shown,
    seconds: (performance.now() - since) / 1000, ...(edited === undefined ? {} : { edited }),
  };
  return doing(async () => show(await until("choose", content)));
}

function edit(side) {
  const box = at(`${side}-edit`), button = document.querySelector(`[data-edit=${side}]`);
  if (editing === side) {
    const text = box.value.trim();
    if (text && text !== item[side].trim()) return choose(`${side}-edited`, text);
    editing = "";
    box.hidden = true;
    at(side).hidden = false;
    button.textContent = "Edit";
    return;
  }
  if (editing) edit(editing);
  editing = side;
  box.value = item[side];
  box.hidden = false;
  at(side).hidden = true;
  button.textContent = "Take the edited answer";
  box.focus();
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.shown) choose(button.dataset.shown);
  else if (button.dataset.edit) edit(button.dataset.edit);
  else if (button.id === "undo") doing(async () => show(await until("undo", { rater, address: address() })));
});

const KEYS = { 1: "left", 2: "right", 3: "tie", 4: "bad", s: "skip" };
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (["INPUT", "TEXTAREA"].includes(event.target.tagName)) return;
  const key = event.key.toLowerCase();
  if (KEYS[key] && item) choose(KEYS[key]);
  else if (key === "u" && !at("undo").hidden) at("undo").click();
});

at("who").addEventListener("submit", (event) => {
  event.preventDefault();
  rater = at("name").value;
  doing(async () => {
    const state = await until("next", { rater });
    rater = state.rater;
    sessionStorage.setItem("rater", rater);
    at("who").hidden = true;
    show(state);
  });
});

(async () => {
  const settings = await until("begin", {});
  edits = settings.edits;
  document.title = settings.title;
  at("title").textContent = settings.title;
  rater = sessionStorage.getItem("rater") || "";
  if (rater) next();
  else {
    at("who").hidden = false;
    at("name").focus();
  }
})();
