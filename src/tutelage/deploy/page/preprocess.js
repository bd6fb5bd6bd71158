// Image to model input, byte for byte as data/decode.py: Pillow's antialiased bilinear resize, written from its definition,
// and the three ways to make an image square. An image is {data, width, height}, data: height * width * 3 bytes, RGB.

const BITS = 22; // fractional bits of the fixed-point weights: 32 bits, less 8 for a pixel and 2 spare
const PAD_GREY = 128;

/** Python's round(): halves go to the even neighbour. */
function rounded(value) {
  const low = Math.floor(value), rest = value - low;
  return rest > 0.5 || (rest === 0.5 && low % 2 === 1) ? low + 1 : low;
}

/**
 * Weights of `from` inputs for each of `to` outputs: a triangle around the output's centre, whose half-width is the scale when
 * shrinking, 1 when enlarging. Returns {first, count, weights, most}: first input, number of inputs, weights * 2^22 (`most` per output).
 */
function triangles(from, to) {
  const scale = from / to, reach = Math.max(scale, 1), squeeze = 1 / reach;
  const most = 2 * Math.ceil(reach) + 1;
  const first = new Int32Array(to), count = new Int32Array(to), weights = new Int32Array(to * most);
  const share = new Float64Array(most);
  for (let i = 0; i < to; i++) {
    const centre = (i + 0.5) * scale;
    const begin = Math.max(0, Math.trunc(centre - reach + 0.5));
    const n = Math.min(from, Math.trunc(centre + reach + 0.5)) - begin;
    let sum = 0;
    for (let k = 0; k < n; k++) {
      share[k] = Math.max(0, 1 - Math.abs((k + begin - centre + 0.5) * squeeze));
      sum += share[k];
    }
    for (let k = 0; k < n; k++) {
      weights[i * most + k] = Math.trunc(0.5 + (sum ? share[k] / sum : share[k]) * 2 ** BITS);
    }
    first[i] = begin;
    count[i] = n;
  }
  return { first, count, weights, most };
}

/** One pass: resize `lines` lines from `from` to `to` pixels; pixels are `step` bytes apart, lines `line` bytes. */
function pass(data, out, from, to, lines, step, line, outStep, outLine) {
  const { first, count, weights, most } = triangles(from, to);
  for (let y = 0; y < lines; y++) {
    for (let i = 0; i < to; i++) {
      const begin = y * line + first[i] * step, n = count[i], w = i * most, target = y * outLine + i * outStep;
      let red = 1 << (BITS - 1), green = red, blue = red; // a half, so that the shift rounds
      for (let k = 0, at = begin; k < n; k++, at += step) {
        const weight = weights[w + k];
        red += data[at] * weight;
        green += data[at + 1] * weight;
        blue += data[at + 2] * weight;
      }
      out[target] = red >> BITS; // out clamps to 0..255
      out[target + 1] = green >> BITS;
      out[target + 2] = blue >> BITS;
    }
  }
  return out;
}

function across({ data, width, height }, to) {
  if (to === width) return { data, width, height };
  const out = new Uint8ClampedArray(to * height * 3);
  return { data: pass(data, out, width, to, height, 3, width * 3, 3, to * 3), width: to, height };
}

function down({ data, width, height }, to) {
  if (to === height) return { data, width, height };
  const out = new Uint8ClampedArray(width * to * 3);
  return { data: pass(data, out, height, to, width, width * 3, 3, width * 3, 3), width, height: to };
}

/**
 * Resize an image, rounding to bytes after each of the two passes. Pillow resizes horizontally first; version 13 and later (`tall`)
 * vertically first if that removes more than twice as many rows as columns, which changes a few values by 1.
 */
export function resize(image, width, height, tall) {
  const rows = image.height - height, columns = image.width - width;
  if (tall && rows > 0 && rows > 2 * columns) return across(down(image, height), width);
  return down(across(image, width), height);
}

/** Crop an image at (left, top) to width x height. */
function cut(image, left, top, width, height) {
  const data = new Uint8ClampedArray(width * height * 3);
  for (let y = 0; y < height; y++) {
    const begin = ((top + y) * image.width + left) * 3;
    data.set(image.data.subarray(begin, begin + width * 3), y * width * 3);
  }
  return { data, width, height };
}

/** Shrink an image to a short side of `side` pixels; smaller images stay unchanged, with null all of them. */
export function shrink(image, side, tall) {
  const short = Math.min(image.width, image.height);
  if (side === null || short <= side) return image;
  const scale = side / short;
  return resize(image, Math.max(side, rounded(image.width * scale)), Math.max(side, rounded(image.height * scale)), tall);
}

/** Make an image a square of `size` pixels by "squash", "crop" or "pad". */
export function fit(image, size, how, tall) {
  const { width, height } = image;
  if (how === "squash") return resize(image, size, size, tall);
  if (how === "crop") {
    const side = Math.min(width, height);
    return resize(cut(image, Math.floor((width - side) / 2), Math.floor((height - side) / 2), side, side), size, size, tall);
  }
  const scale = size / Math.max(width, height);
  const inner = resize(image, Math.max(1, rounded(width * scale)), Math.max(1, rounded(height * scale)), tall);
  const data = new Uint8ClampedArray(size * size * 3).fill(PAD_GREY);
  const left = Math.floor((size - inner.width) / 2), top = Math.floor((size - inner.height) / 2);
  for (let y = 0; y < inner.height; y++) {
    data.set(inner.data.subarray(y * inner.width * 3, (y + 1) * inner.width * 3), ((top + y) * size + left) * 3);
  }
  return { data, width: size, height: size };
}

/** The model's input for an image of any size: {data, shape} as preprocess.json specifies; tall: see resize. */
export function modelInput(image, about, tall) {
  const size = about.size;
  const square = fit(shrink(image, about.decode_short_side, tall), size, about.resize, tall).data;
  const planes = about.input.layout === "NCHW", area = size * size;
  const normalised = about.input.dtype === "float32";
  const data = normalised ? new Float32Array(3 * area) : new Uint8Array(3 * area);
  for (let i = 0; i < area; i++) {
    for (let c = 0; c < 3; c++) {
      const value = square[3 * i + c];
      data[planes ? c * area + i : 3 * i + c] = normalised ? (value / 255 - about.mean[c]) / about.std[c] : value;
    }
  }
  return { data, shape: planes ? [1, 3, size, size] : [1, size, size, 3] };
}

/** Logits to probabilities. */
export function softmax(logits) {
  const top = Math.max(...logits);
  const powers = Array.from(logits, (value) => Math.exp(value - top));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((value) => value / sum);
}
