// The chat page: asks the API of this server, shows the answer as it comes. What a model writes is only ever inserted
// as text, never as markup. The conversation lives in this page and nowhere else; a key, in this tab's session.

const byId = (id) => document.getElementById(id);
const [model, status, scroller, welcome, log, composer, prompt, send, stop, keyDialog, keyInput] = [
  "model", "status", "scroller", "welcome", "log", "composer", "prompt", "send", "stop", "key-dialog", "key",
].map(byId);

const POLL_MS = 5000;
const KEY = "petals-win-api-key";
const touch = matchMedia("(pointer: coarse)");

let messages = [];
let running = null; // the AbortController of the answer that is being written
let asking = null; // the promise of the key dialog while it is open
let keyDeclined = false;

class ApiError extends Error {}

/** Call the API. A 401 asks the user for a key and tries again; other errors are thrown with the server's sentence. */
async function call(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
    const response = await fetch(path, { cache: "no-store", ...options, headers });
    if (response.status !== 401) return response;
    if (key === sessionStorage.getItem(KEY) && !(await askForKey(Boolean(key)))) {
      throw new ApiError("This API needs a key.");
    }
  }
}

function askForKey(wrong) {
  asking ??= new Promise((resolve) => {
    byId("key-title").textContent = wrong ? "This key is not valid" : "This API needs a key";
    keyInput.value = "";
    keyDialog.showModal();
    keyDialog.addEventListener("close", () => {
      const key = keyDialog.returnValue;
      keyDialog.returnValue = "";
      if (key) sessionStorage.setItem(KEY, key);
      keyDeclined = !key;
      asking = null;
      resolve(Boolean(key));
    }, { once: true });
  });
  return asking;
}

async function errorOf(response) {
  const body = await response.json().catch(() => null);
  return new ApiError(body?.error?.message ?? `The server answered with status ${response.status}.`);
}

const sentence = (error) =>
  error instanceof ApiError ? error.message : "The server cannot be reached. Is petals-win still running?";

// ---- the swarm ----

function show(state, text) {
  if (status.textContent === text && status.dataset.state === state) return; // say nothing twice to a screen reader
  status.dataset.state = state;
  status.textContent = text;
}

async function lookAtSwarm() {
  if (document.hidden || keyDeclined || asking) return;
  try {
    if (model.disabled) await loadModels();
    const swarm = await (await call("ready")).json();
    if (swarm.error) throw new ApiError(swarm.error.message);
    const count = swarm.peers.length;
    const nodes = `${count} ${count === 1 ? "node" : "nodes"}`;
    const chosen = swarm.engines.find(({ models }) => models.includes(model.value));
    if (swarm.engines.length > 1 && chosen && chosen.state !== "loaded") {
      show(chosen.ready ? "waiting" : "missing", chosen.detail);
    } else if (swarm.ready) show("ready", `Ready · ${count ? nodes : "this PC alone"}`);
    else show("missing", `${swarm.detail} (${nodes} online)`);
  } catch (error) {
    show("broken", sentence(error));
  }
}

async function loadModels() {
  const response = await call("v1/models");
  if (!response.ok) throw await errorOf(response);
  const { data } = await response.json();
  if (!data.length) return;
  model.replaceChildren(...data.map(({ id }) => new Option(id.split("/").pop(), id)));
  model.disabled = false;
}

// ---- the conversation ----

function add(role, text = "") {
  const article = document.createElement("article");
  article.className = `message ${role}`;
  article.ariaLabel = role === "user" ? "You" : "Answer";
  const paragraph = document.createElement("p");
  paragraph.className = "text";
  const content = document.createTextNode(text);
  paragraph.append(content);
  article.append(paragraph);
  log.append(article);
  welcome.hidden = true;
  return { article, content };
}

/** What a model thinks before it answers, closed until somebody wants to read it. Returns where its text goes. */
function addThoughts(article) {
  const details = document.createElement("details");
  details.className = "thoughts";
  const summary = document.createElement("summary");
  summary.textContent = "Thoughts";
  const paragraph = document.createElement("p");
  const thoughts = document.createTextNode("");
  paragraph.append(thoughts);
  details.append(summary, paragraph);
  article.prepend(details);
  return thoughts;
}

function addError(text) {
  const note = document.createElement("p");
  note.className = "note error";
  note.setAttribute("role", "alert");
  note.textContent = text;
  log.append(note);
  toEnd();
}

const atEnd = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;
const toEnd = () => { scroller.scrollTop = scroller.scrollHeight; };

/** Events of a stream of server-sent events, as the objects that they carry. */
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      const data = line.slice(6);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(event.error.message);
      yield event;
    }
  }
}

/** Counts tokens and their speed: from the first to the last one, without the reading of the prompt. */
class Meter {
  tokens = 0;

  token() {
    this.tokens += 1;
    this.last = performance.now();
    this.first ??= this.last;
  }

  toString() {
    const count = `${this.tokens} ${this.tokens === 1 ? "token" : "tokens"}`;
    const seconds = (this.last - this.first) / 1000;
    return seconds > 0 ? `${count} · ${((this.tokens - 1) / seconds).toFixed(1)} tokens/s` : count;
  }
}

async function ask(question) {
  running = new AbortController();
  send.hidden = true;
  stop.hidden = false;
  document.querySelectorAll(".error").forEach((note) => note.remove());
  const asked = add("user", question);
  messages.push({ role: "user", content: question });
  const conversation = messages;
  const { article, content } = add("assistant");
  article.ariaBusy = "true"; // a screen reader waits for the whole answer
  const facts = document.createElement("p");
  facts.className = "facts";
  toEnd();

  const meter = new Meter();
  let thoughts = null;
  let ending = "";
  let failure = null;
  try {
    if (model.disabled) await loadModels();
    const response = await call("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({
        model: model.value, messages, stream: true, stream_options: { include_usage: true },
      }),
      signal: running.signal,
    });
    if (!response.ok) throw await errorOf(response);
    for await (const { choices: [choice], usage } of eventsOf(response)) {
      const follow = atEnd();
      if (usage) meter.tokens = usage.completion_tokens;
      if (choice?.finish_reason === "length") ending = " · as long as allowed";
      const { reasoning_content: thought, content: said } = choice?.delta ?? {};
      if (thought) {
        thoughts ??= addThoughts(article);
        thoughts.appendData(thought);
      }
      if (said) content.appendData(said);
      if (thought || said) meter.token();
      if (meter.tokens) {
        facts.textContent = `${meter}${ending}`;
        article.append(facts);
      }
      if (follow) toEnd();
    }
  } catch (error) {
    if (error.name === "AbortError") ending = " · stopped";
    else failure = sentence(error);
  }

  article.ariaBusy = "false";
  if (meter.tokens) facts.textContent = `${meter}${ending}`;
  if (content.data) {
    conversation.push({ role: "assistant", content: content.data });
  } else {
    // Nothing was answered: take the question back, so that it can be sent again.
    if (!running.signal.aborted) {
      failure ??= "The model ended its answer before the first word. Send the question again, or put it another way.";
    }
    article.remove();
    asked.article.remove();
    conversation.pop();
    if (conversation === messages && !prompt.value) prompt.value = question;
    welcome.hidden = messages.length > 0;
  }
  if (failure && conversation === messages) addError(failure);
  running = null;
  send.hidden = false;
  stop.hidden = true;
  fit();
  if (!touch.matches) prompt.focus({ preventScroll: true }); // on a phone it would open the keyboard
  lookAtSwarm();
}

function newChat() {
  running?.abort();
  messages = [];
  log.replaceChildren();
  welcome.hidden = false;
  if (!touch.matches) prompt.focus();
}

function fit() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight + 2}px`;
  send.disabled = !prompt.value.trim();
}

// ---- what the user does ----

composer.addEventListener("submit", (event) => {
  event.preventDefault();
  const question = prompt.value.trim();
  if (!question || running) return;
  prompt.value = "";
  fit();
  ask(question);
});

prompt.addEventListener("input", fit);
prompt.addEventListener("keydown", (event) => {
  // On a phone the Enter key makes a new line: there is a button to send.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || touch.matches) return;
  event.preventDefault();
  composer.requestSubmit();
});

stop.addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !keyDialog.open) running?.abort();
});
byId("new-chat").addEventListener("click", newChat);
byId("key-cancel").addEventListener("click", () => keyDialog.close());
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  keyDialog.close(keyInput.value.trim());
});
model.addEventListener("change", lookAtSwarm);
document.addEventListener("visibilitychange", lookAtSwarm);

fit();
lookAtSwarm();
setInterval(lookAtSwarm, POLL_MS);
