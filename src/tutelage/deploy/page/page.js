// The page itself: takes images, runs the model on one after another and shows the predictions. Nothing is fetched or sent.

const SHOWN = 5; // classes shown for each image
const STRIP = 512; // rows read from the canvas at a time: browsers limit its area
const KINDS = "JPEG, PNG, GIF, WebP, AVIF or BMP";

const about = JSON.parse(document.getElementById("about").textContent);
const status = document.getElementById("status");
const results = document.getElementById("results");
const clear = document.getElementById("clear");
let waiting = 0, given = 0, unread = 0; // images left; in this batch: all images, and unreadable ones
let queue = load().catch((error) => {
  say(`The model cannot be used: ${error.message}`, true);
  return null;
});

/** Show a status line; screen readers announce it. */
function say(text, bad = false) {
  status.textContent = text;
  status.classList.toggle("bad", bad);
}

/** The bytes that an element of this page holds as gzip in base 64. */
async function unpacked(id) {
  const element = document.getElementById(id);
  const text = atob(element.textContent.trim());
  element.remove(); // frees the memory of its text
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** Load the model and run it once, since the first run is slow. */
async function load() {
  if (typeof DecompressionStream === "undefined" || typeof WebAssembly === "undefined") {
    throw new Error("this browser is too old (Chrome or Edge 91, Firefox 113, Safari 16.4 or later will do)");
  }
  ort.env.logLevel = "error";
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmBinary = await unpacked("wasm");
  const session = await ort.InferenceSession.create(await unpacked("model"), { executionProviders: ["wasm"], logSeverityLevel: 3 });
  const { size } = about.preprocess;
  await probabilities(session, { data: new Uint8ClampedArray(size * size * 3), width: size, height: size });
  if (!waiting) say("Ready.");
  return session;
}

/** One image -> {values: a probability for each class, milliseconds: time of the model}. */
async function probabilities(session, image) {
  const { input, output } = about.preprocess;
  const { data, shape } = modelInput(image, about.preprocess, about.tall_first);
  const tensor = new ort.Tensor(input.dtype, data, shape);
  const began = performance.now();
  const found = (await session.run({ [input.name]: tensor }))[output.name].data;
  const milliseconds = performance.now() - began;
  if (found.length !== about.labels.length) {
    throw new Error(`it gives ${found.length} values, and there are ${about.labels.length} class names`);
  }
  return { values: output.kind === "logits" ? softmax(found) : Array.from(found), milliseconds };
}

/** A file -> {data, width, height} in RGB: rotated as its EXIF block says, transparency on white, colours as stored. */
async function decoded(file) {
  if (!file.size) throw new Error("the file is empty");
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { colorSpaceConversion: "none" });
  } catch {
    throw new Error(`not an image that this browser can read; ${KINDS} will do`);
  }
  try {
    return pixels(bitmap);
  } finally {
    bitmap.close();
  }
}

/** A bitmap -> {data, width, height} in RGB. */
function pixels(bitmap) {
  const { width, height } = bitmap;
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = Math.min(STRIP, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const data = new Uint8ClampedArray(width * height * 3);
  for (let top = 0, at = 0; top < height; top += STRIP) {
    const rows = Math.min(STRIP, height - top);
    context.fillStyle = "#fff";
    context.fillRect(0, 0, width, rows);
    context.drawImage(bitmap, 0, top, width, rows, 0, 0, width, rows);
    const rgba = context.getImageData(0, 0, width, rows).data;
    for (let i = 0; i < rgba.length; i += 4, at += 3) {
      data[at] = rgba[i];
      data[at + 1] = rgba[i + 1];
      data[at + 2] = rgba[i + 2];
    }
  }
  return { data, width, height };
}

/** An element with a class and a text; names of files and classes are set as text, never as HTML. */
function make(tag, name = "", text = "") {
  const element = document.createElement(tag);
  if (name) element.className = name;
  element.textContent = text;
  return element;
}

function percent(share) {
  return `${(100 * share).toFixed(1)} %`;
}

/** Show the prediction in the image's entry of the list, and return it as a line. */
function show(place, image, { values, milliseconds }) {
  const order = Array.from(values.keys()).sort((a, b) => values[b] - values[a] || a - b);
  const best = values[order[0]], bound = about.preprocess.unsure_below;
  const unsure = bound !== null && best < bound;
  const answer = make("p", "answer", about.labels[order[0]]);
  if (unsure) {
    const mark = make("span", "unsure", "unsure");
    mark.title = `the best class has less than ${percent(bound)}`;
    answer.append(" ", mark);
  }
  const bars = make("ol", "bars");
  for (const index of order.slice(0, SHOWN)) {
    const row = make("li"), track = make("span", "track"), bar = make("span", "bar"), value = make("data", "", percent(values[index]));
    bar.style.width = `${100 * values[index]}%`;
    track.setAttribute("aria-hidden", "true");
    track.append(bar);
    value.value = String(values[index]);
    row.append(make("span", "class", about.labels[index]), value, track);
    bars.append(row);
  }
  const took = `${milliseconds < 10 ? milliseconds.toFixed(1) : Math.round(milliseconds)} ms`;
  place.said.replaceChildren(place.name, answer, bars, make("p", "faint", `${image.width} × ${image.height} pixels · ${took}`));
  return `${about.labels[order[0]]}, ${percent(best)}${unsure ? ", unsure" : ""}`;
}

/** A new entry of the list, before the model has run. */
function placeFor(file, name) {
  const item = make("li"), picture = make("div", "picture"), said = make("div", "said"), heading = make("h2", "", name);
  said.append(heading, make("p", "faint", "waiting…"));
  item.append(picture, said);
  return { item, picture, said, name: heading };
}

/** Add the picture to its entry, once the file has been decoded. */
function picture(place, file, name) {
  const image = make("img");
  image.alt = name;
  image.src = URL.createObjectURL(file);
  place.picture.append(image);
}

/** Classify one file and return the answer as a line; an error is shown in its entry and does not stop the others. */
async function classify(session, file, name, place) {
  if (!session) {
    place.said.replaceChildren(place.name, make("p", "bad", "the model cannot be used"));
    return null;
  }
  try {
    const image = await decoded(file);
    picture(place, file, name);
    const answer = show(place, image, await probabilities(session, image));
    return `${name}: ${answer}`;
  } catch (error) {
    place.item.classList.add("failed");
    place.said.replaceChildren(place.name, make("p", "bad", error.message));
    unread += 1;
    return `${name}: ${error.message}`;
  }
}

/** Update the status after an image: its answer if it was the only one, else the number of images. */
function report(last) {
  const kept = unread ? `, ${unread} of them could not be read` : "";
  if (waiting) say(`${waiting} to go`);
  else say(given === 1 ? last : `${given} images${kept}.`, unread > 0);
}

/** Queue images in the order given; the newest come first in the list. */
function take(files, fallback = "") {
  const list = Array.from(files);
  const places = list.map((file) => placeFor(file, fallback || file.name));
  results.prepend(...places.map((place) => place.item));
  clear.hidden = !results.children.length;
  if (!waiting) given = unread = 0;
  waiting += list.length;
  given += list.length;
  list.forEach((file, i) => {
    queue = queue.then(async (session) => {
      await new Promise((resume) => setTimeout(resume)); // the page can respond between two images
      const said = await classify(session, file, fallback || file.name, places[i]);
      waiting -= 1;
      if (session) report(said);
      return session;
    });
  });
}

document.getElementById("files").addEventListener("change", (event) => {
  take(event.target.files);
  event.target.value = ""; // so that the same file can be chosen again
});

let inside = 0; // dragenter minus dragleave events: both fire for every element that is crossed
const over = (on) => document.body.classList.toggle("over", on);
addEventListener("dragenter", () => over(++inside > 0));
addEventListener("dragleave", () => over(--inside > 0));
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  inside = 0;
  over(false);
  if (event.dataTransfer.files.length) take(event.dataTransfer.files);
  else say("No file was dropped: save the image first, and drop the file.", true);
});
addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) take(event.clipboardData.files, "pasted image");
  else say("No image was pasted.", true);
});

clear.addEventListener("click", () => {
  for (const image of results.querySelectorAll("img")) URL.revokeObjectURL(image.src);
  results.replaceChildren();
  clear.hidden = true;
  say("Ready.");
  document.getElementById("files").focus();
});
