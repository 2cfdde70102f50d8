// The camera's dialog: a live picture, one shot. The picture stays in the page until it is sent like any other photo.
import { t } from "./i18n.js";
import { $ } from "./page.js";

// Browsers give a camera to https and to this machine itself only.
export const canFilm = () => Boolean(navigator.mediaDevices?.getUserMedia);

const dialog = $("camera-dialog");
const video = $("camera-video");
let stream = null;
let facing = "user";
let shot = null;

// Resolves to the photo as a file, or to null. first: "user" or "environment".
export async function film(first) {
  facing = first;
  shot = null;
  $("camera-turn").hidden = true;
  dialog.showModal();
  const closed = new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  await start();
  await closed;
  stop();
  return shot;
}

async function start() {
  stop();
  $("camera-shoot").disabled = true;
  $("camera-note").textContent = t("cameraStarting");
  try {
    const opened = await navigator.mediaDevices.getUserMedia({ video: { facingMode: facing, width: { ideal: 2560 }, height: { ideal: 2560 } } });
    if (!dialog.open) return opened.getTracks().forEach((track) => track.stop());
    stream = opened;
    video.srcObject = stream;
    await video.play();
    video.classList.toggle("mirrored", stream.getVideoTracks()[0].getSettings().facingMode !== "environment");
    $("camera-note").textContent = t("cameraHint");
    $("camera-shoot").disabled = false;
    const devices = await navigator.mediaDevices.enumerateDevices();
    $("camera-turn").hidden = devices.filter((device) => device.kind === "videoinput").length < 2;
  } catch (error) {
    $("camera-note").textContent = t(error.name === "NotAllowedError" ? "cameraDenied" : "cameraMissing");
  }
}

function stop() {
  stream?.getTracks().forEach((track) => track.stop());
  stream = video.srcObject = null;
}

$("camera-close").addEventListener("click", () => dialog.close());
$("camera-turn").addEventListener("click", () => {
  facing = facing === "user" ? "environment" : "user";
  start();
});
// Seen as in a mirror, kept as others see it: a parting stays on its side.
$("camera-shoot").addEventListener("click", () => {
  const canvas = Object.assign(document.createElement("canvas"), { width: video.videoWidth, height: video.videoHeight });
  canvas.getContext("2d").drawImage(video, 0, 0);
  canvas.toBlob(
    (blob) => {
      if (blob) shot = new File([blob], "camera.jpg", { type: "image/jpeg" });
      dialog.close();
    },
    "image/jpeg",
    0.95,
  );
});
