// The server's HTTP contract, as functions. A failure is thrown as the server's problem: {code, status, detail, hint, errors, retryAfter}.
import { pause } from "./page.js";

export class ProblemError extends Error {
  constructor(problem) {
    super(problem.detail ?? problem.code);
    this.problem = problem;
  }
}

let askForKey = async () => null;
let asking = null; // one question, however many requests wait for its answer

export function onKeyWanted(ask) {
  askForKey = ask;
}

const storedKey = () => sessionStorage.getItem("deephair-key");

function headers(extra, key) {
  return key ? { ...extra, Authorization: `Bearer ${key}` } : { ...extra };
}

async function request(path, options = {}) {
  const key = storedKey();
  let response;
  try {
    response = await fetch(path, { ...options, headers: headers(options.headers, key), cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ProblemError({ code: "network" });
  }
  if (response.ok) return response;
  const problem = await problemIn(response);
  if (response.status === 401 && (storedKey() !== key || (await newKey()))) return request(path, options);
  throw new ProblemError({ ...problem, status: response.status, retryAfter: response.headers.get("Retry-After") });
}

// What is no problem of the server comes from a proxy before it, which cannot reach it.
async function problemIn(response) {
  const told = await response.json().catch(() => null);
  if (told?.code) return told;
  return { code: response.status === 413 ? "upload_too_large" : "network", detail: response.statusText };
}

const TRIES = 20; // over some four minutes

// Whether a failure says nothing about what was asked for: the server, or the way to it, is away for a moment.
function passes(error) {
  return error instanceof ProblemError && (error.problem.code === "network" || [502, 503, 504].includes(error.problem.status));
}

const betweenTries = (failures) => pause(Math.min(15000, 1500 * failures));

// Does again what fails for a moment. Throws what stays.
export async function patiently(work) {
  for (let failures = 1; ; failures += 1) {
    try {
      return await work();
    } catch (error) {
      if (!passes(error) || failures > TRIES) throw error;
    }
    await betweenTries(failures);
  }
}

async function newKey() {
  asking ??= askForKey().finally(() => (asking = null));
  const key = await asking;
  if (key) sessionStorage.setItem("deephair-key", key);
  return Boolean(key);
}

// A body that breaks off, or is no JSON, comes from the way between; anything else that fails is a fault of this page and is not tried again.
function lost(error) {
  throw error.name === "AbortError" ? error : new ProblemError({ code: "network" });
}

const json = async (path, options) => (await request(path, options)).json().catch(lost);
const blob = async (path) => (await request(path)).blob().catch(lost);

function form(fields) {
  const data = new FormData();
  for (const [name, value] of Object.entries(fields)) if (value !== null && value !== undefined && value !== "") data.append(name, value);
  return data;
}

export const models = () => json("/api/v1/models");
export const openapi = () => json("/api/v1/openapi.json");
export const gallery = () => json("/api/v1/gallery");
export const picture = (url) => blob(url);
export const preview = (file, signal) => json("/api/v1/preview", { method: "POST", body: form({ target: file }), signal });
export const createJob = (fields) => json("/api/v1/jobs", { method: "POST", body: form(fields) });
export const readJob = (id) => json(`/api/v1/jobs/${id}`);
export const deleteJob = (id) => request(`/api/v1/jobs/${id}`, { method: "DELETE" });
export const result = (id) => patiently(() => blob(`/api/v1/jobs/${id}/result`));

export const FINAL = ["succeeded", "failed", "cancelled"];

// Follows a job to its end, calling onState(job) and onProgress(progress); returns the ended job. fetch instead of EventSource, because
// EventSource cannot send a key. A broken stream is taken up again where it stopped, and the job itself is read meanwhile: where a proxy keeps
// streams back, it still ends here.
export async function follow(id, onState, onProgress) {
  let lastId = null;
  for (let failures = 0; ; ) {
    try {
      if (failures) {
        const job = await readJob(id);
        if (FINAL.includes(job.state)) return job;
        if (job.progress) onProgress(job.progress);
        else onState(job);
      }
      const response = await request(`/api/v1/jobs/${id}/events`, { headers: lastId ? { "Last-Event-ID": lastId } : {} });
      for await (const event of events(response.body)) {
        failures = 0;
        lastId = event.id ?? lastId;
        if (event.event === "progress") onProgress(event.data);
        if (event.event === "state") {
          onState(event.data);
          if (FINAL.includes(event.data.state)) return event.data;
        }
      }
      failures = 1; // the server answers, so the job is not given up
    } catch (error) {
      failures += 1;
      if (!passes(error) || failures > TRIES) throw error;
    }
    await betweenTries(failures);
  }
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read().catch(lost);
    if (done) return;
    text += value;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const lines = block.split("\n").filter((line) => /^\w+: /.test(line));
      const fields = Object.fromEntries(lines.map((line) => [line.slice(0, line.indexOf(": ")), line.slice(line.indexOf(": ") + 2)]));
      if (fields.data) yield { ...fields, data: JSON.parse(fields.data) };
    }
  }
}
