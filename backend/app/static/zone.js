// A place for one photo: file picker, drag and drop, paste, camera. Tells its owner through onChange(file or null).
import { canFilm, film } from "./camera.js";

const TYPES = ["image/jpeg", "image/png", "image/webp"];

export function makeZone(root, facing, onChange) {
  const input = root.querySelector(".picker");
  const capture = root.querySelector(".capture");
  const camera = root.querySelector(".camera");
  const photo = root.querySelector(".photo");
  const canvas = root.querySelector("canvas");
  const byHand = matchMedia("(pointer: coarse)").matches; // a phone's own camera program, where the page may not film
  const hasCamera = canFilm() || byHand;
  let file = null;
  let url = null;

  function set(chosen) {
    if (url) URL.revokeObjectURL(url);
    file = chosen;
    url = chosen ? URL.createObjectURL(chosen) : null;
    root.classList.remove("unseen");
    if (url) photo.src = url;
    else photo.removeAttribute("src");
    const focused = document.activeElement === input || document.activeElement === camera;
    input.hidden = root.querySelector(".drop").hidden = Boolean(chosen);
    camera.hidden = Boolean(chosen) || !hasCamera;
    root.querySelector(".filled").hidden = !chosen;
    if (chosen && focused) root.querySelector(".change").focus();
    canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
    onChange(chosen);
  }

  camera.hidden = !hasCamera;
  camera.addEventListener("click", async () => {
    if (!canFilm()) return capture.click();
    const shot = await film(facing);
    if (shot) set(shot);
  });
  photo.addEventListener("error", () => root.classList.toggle("unseen", Boolean(url))); // a format that the browser cannot show
  for (const picker of [input, capture])
    picker.addEventListener("change", () => {
      if (picker.files.length) set(picker.files[0]);
      picker.value = "";
    });
  root.querySelector(".change").addEventListener("click", () => input.click());
  root.querySelector(".remove").addEventListener("click", () => {
    set(null);
    input.focus();
  });
  for (const name of ["dragenter", "dragover"])
    root.addEventListener(name, (event) => {
      event.preventDefault();
      root.classList.add("over");
    });
  root.addEventListener("dragleave", (event) => {
    if (!root.contains(event.relatedTarget)) root.classList.remove("over");
  });
  root.addEventListener("drop", (event) => {
    event.preventDefault();
    root.classList.remove("over");
    const dropped = firstPhoto(event.dataTransfer);
    if (dropped) set(dropped);
  });

  return {
    root,
    canvas,
    photo,
    set,
    get file() {
      return file;
    },
    get url() {
      return url;
    },
    note: root.querySelector(".note"),
  };
}

// The first file of a drag or a paste; one of another type is passed on, and the server says what is wrong with it.
export function firstPhoto(transfer) {
  const files = [...(transfer?.files ?? [])];
  return files.find((file) => TYPES.includes(file.type)) ?? files[0] ?? null;
}
