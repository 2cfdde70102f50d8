// A place for one photo: file picker, drag and drop, paste. Tells its owner through onChange(file or null).

const TYPES = ["image/jpeg", "image/png", "image/webp"];

export function makeZone(root, onChange) {
  const input = root.querySelector("input");
  const photo = root.querySelector(".photo");
  const canvas = root.querySelector("canvas");
  let file = null;
  let url = null;

  function set(chosen) {
    if (url) URL.revokeObjectURL(url);
    file = chosen;
    url = chosen ? URL.createObjectURL(chosen) : null;
    if (url) photo.src = url;
    else photo.removeAttribute("src");
    const focused = document.activeElement === input;
    input.hidden = root.querySelector(".drop").hidden = Boolean(chosen);
    root.querySelector(".filled").hidden = !chosen;
    if (chosen && focused) root.querySelector(".change").focus();
    canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
    onChange(chosen);
  }

  input.addEventListener("change", () => {
    if (input.files.length) set(input.files[0]);
    input.value = "";
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
