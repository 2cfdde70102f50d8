// One run of try-ons: as many jobs as variants are wanted, followed to their ends one after the other, with cancel and deletion.
import * as api from "./api.js";
import { duration, t } from "./i18n.js";
import { $, announce, problemOf, say } from "./page.js";
import { arrive, drop, setWorking, showProblem } from "./stage.js";

const STORE = "deephair-jobs";
// The jobs of this tab whose photos the server may still have; they outlive a reload, so that they can be deleted after it.
const mine = new Set(JSON.parse(sessionStorage.getItem(STORE) ?? "[]"));
let run = null; // {jobs by shot, count of variants, cancelled, refusal: the problem of the first that was not taken}

function remember(id) {
  mine.add(id);
  store();
}

function forget(id) {
  mine.delete(id);
  store();
}

function store() {
  sessionStorage.setItem(STORE, JSON.stringify([...mine]));
  $("privacy").hidden = !mine.size;
}
store();

// Sends a job for each shot and shows what comes; gives {taken: how many were, refusal: why not all}. Where the first is refused, its problem
// is shown.
export async function tryOn(fields, shots) {
  return running(shots.length, async () => {
    progress(null, () => t("sending"));
    let last = Promise.resolve();
    const sending = shots.map((shot) => (last = last.then(() => send(shot, fields))));
    await followAll(shots, sending);
    return { taken: run.jobs.size, refusal: run.cancelled ? null : run.refusal };
  });
}

async function running(count, work) {
  run = { jobs: new Map(), count, cancelled: false, refusal: null };
  setWorking(true);
  try {
    return await work();
  } finally {
    setWorking(false);
    run = null;
  }
}

// jobs: one for each shot, or a promise of it.
async function followAll(shots, jobs) {
  for (const [index, shot] of shots.entries()) {
    const job = await jobs[index];
    if (job) await follow(shot, job, index + 1);
  }
}

// ---- what an earlier load of the page began ----

// The remembered jobs that there is something of to show or to follow, the ready ones first; what the server does not have any more is
// forgotten. Throws the server's problem.
export async function remembered() {
  const jobs = [];
  for (const id of [...mine]) {
    const job = await api.patiently(() => api.readJob(id)).catch(noneIfGone);
    if (!job || job.photos_deleted) forget(id);
    else if (job.state === "succeeded" || !api.FINAL.includes(job.state)) jobs.push(job);
  }
  return jobs.sort((one, other) => (other.state === "succeeded") - (one.state === "succeeded"));
}

function noneIfGone(error) {
  if (error.problem?.code !== "not_found") throw error;
  return null;
}

// Shows and follows jobs of which ``remembered`` told.
export async function takeUp(jobs, shots) {
  return running(shots.length, () => {
    for (const [index, shot] of shots.entries()) run.jobs.set(shot, jobs[index]);
    return followAll(shots, jobs);
  });
}

// Gives the job, or null where it, or one before it, was refused.
async function send(shot, fields) {
  try {
    if (!run.refusal && !run.cancelled) {
      const job = await api.createJob({ ...fields, seed: shot.seed });
      remember(job.id);
      run.jobs.set(shot, job);
      if (run.cancelled) await erase(job.id);
      return job;
    }
  } catch (error) {
    run.refusal = problemOf(error);
    if (!run.jobs.size || run.cancelled) showProblem(run.refusal);
  }
  run.count = run.jobs.size;
  drop(shot);
  return null;
}

async function follow(shot, job, number) {
  try {
    const ended = await api.follow(
      job.id,
      (state) => showState(state, number),
      (step) => showStep(step, number),
    );
    if (ended.state === "succeeded") {
      shot.seed ??= ended.result.info.seed ?? shot.number;
      arrive(shot, await api.result(job.id));
      announce(t("ready"));
      return;
    }
    drop(shot);
    if (ended.state === "cancelled") forget(job.id);
    else showProblem(ended.error);
  } catch (error) {
    drop(shot);
    if (!run.cancelled) showProblem(problemOf(error));
  }
}

// ---- progress ----

const ofMany = (number) => (run.count > 1 ? `${t("ofMany", { number, count: run.count })} · ` : "");
const overall = (number, fraction) => (number - 1 + fraction) / run.count;

function showState(job, number) {
  const prefix = ofMany(number);
  const text = { queued: () => (job.position > 1 ? t("queued", { position: job.position }) : t("queuedFirst")), running: () => t("preparing") };
  if (job.state in text) progress(number > 1 ? overall(number, 0) : null, () => prefix + text[job.state]());
}

function showStep({ done, total, fraction, eta_s: eta }, number) {
  const prefix = ofMany(number);
  const left = () => (eta === null ? "" : ` · ${t("left", { time: duration(eta) })}`);
  progress(overall(number, fraction), () => prefix + (done === total ? t("finishing") : t("step", { done, total }) + left()));
}

// Spoken at the quarters only: a reader that hears every step hears nothing else.
let spoken = -1;
function progress(fraction, text) {
  const percent = fraction === null ? null : Math.round(fraction * 100);
  say("status", () => ($("status").textContent = text()));
  $("bar").classList.toggle("waiting", percent === null);
  if (percent === null) $("bar").removeAttribute("aria-valuenow");
  else $("bar").setAttribute("aria-valuenow", String(percent));
  $("bar").style.setProperty("--done", `${percent ?? 0}%`);
  const quarter = percent === null ? -1 : Math.floor(percent / 25);
  if (percent === null || quarter !== spoken) announce(text());
  spoken = quarter;
}

// ---- cancel and deletion ----

async function erase(id) {
  await api.deleteJob(id).catch(noneIfGone); // its time may be up already
  forget(id);
}

// Cancels what has not ended; pictures that are ready stay.
export async function cancel() {
  if (!run) return;
  run.cancelled = true;
  const open = [...run.jobs].filter(([shot]) => !shot.url).map(([, job]) => job.id);
  try {
    await Promise.all(open.map(erase));
    announce(t("cancelled"));
  } catch (error) {
    showProblem(problemOf(error));
  }
}

// Deletes everything of this tab from the server, running jobs included. Throws the server's problem.
export async function eraseAll() {
  if (run) run.cancelled = true;
  for (const id of [...mine]) await erase(id);
}
