// Pictures as the page holds them: read from a file, scaled down on request, or drawn as an example.

export const SCALED_PX = 1024; // longest side after `scaledDown`

/** {name, blob, url, width, height}; raises an Error with a text for people where `blob` is no picture. */
export async function readPicture(blob, name) {
  const url = URL.createObjectURL(blob);
  const image = new Image();
  image.src = url;
  try {
    await image.decode();
  } catch {
    URL.revokeObjectURL(url);
    throw new Error(`${name} cannot be read as a picture. PNG, JPEG and WebP can.`);
  }
  return { name, blob, url, width: image.naturalWidth, height: image.naturalHeight };
}

/** The picture's file in base64, as the service reads it. */
export function toBase64(picture) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.split(",")[1]);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(picture.blob);
  });
}

export async function scaledDown(picture) {
  const factor = SCALED_PX / Math.max(picture.width, picture.height);
  const [width, height] = [picture.width, picture.height].map((side) => Math.max(Math.round(side * factor), 1));
  const options = { resizeWidth: width, resizeHeight: height, resizeQuality: "high" };
  const bitmap = await createImageBitmap(picture.blob, options);
  const blob = await toBlob(width, height, (context) => context.drawImage(bitmap, 0, 0));
  return readPicture(blob, `${picture.name}, scaled down`);
}

/** A heart with a little light on it: something to try the words on. */
export async function drawExample() {
  const side = 256;
  const blob = await toBlob(side, side, (context) => {
    context.fillStyle = "#fff";
    context.fillRect(0, 0, side, side);
    const light = context.createRadialGradient(92, 78, 8, 128, 128, 140);
    light.addColorStop(0, "#ff9d92");
    light.addColorStop(0.35, "#ee3b3b");
    light.addColorStop(1, "#a80f2e");
    context.fillStyle = light;
    context.beginPath();
    context.moveTo(128, 228);
    context.bezierCurveTo(60, 176, 18, 138, 18, 90);
    context.bezierCurveTo(18, 26, 100, 10, 128, 66);
    context.bezierCurveTo(156, 10, 238, 26, 238, 90);
    context.bezierCurveTo(238, 138, 196, 176, 128, 228);
    context.fill();
  });
  return readPicture(blob, "a drawn heart");
}

function toBlob(width, height, paint) {
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width, height });
  paint(canvas.getContext("2d"));
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}
