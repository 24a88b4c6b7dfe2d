// node build/adapters-VERSION.cjs ANSWERS CT_FOLDER SEG...: writes what the adapters mark on each image, a line of JSON a SEG:
// {"labels": {SOPInstanceUID: base64 of a byte a pixel}} or {"error": ...}
import { readFileSync, readdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import dcmjs from 'dcmjs';
import { adaptersSEG } from 'adapters';
import { metaData } from '@cornerstonejs/core';

const [written, folder, ...paths] = process.argv.slice(2);
const { DicomMessage, DicomMetaDictionary } = dcmjs.data;
console.log = console.warn = console.info = console.error = () => {};

function bytesOf(file) {
  const bytes = readFileSync(file);
  return bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length);
}
function instanceOf(file) {
  return DicomMetaDictionary.naturalizeDataset(DicomMessage.readFile(bytesOf(file)).dict);
}
const instances = new Map();
for (const name of readdirSync(folder).sort()) {
  const instance = instanceOf(join(folder, name));
  instance.PixelData = undefined;
  instances.set(`image:${instance.SOPInstanceUID}`, instance);
}
function get(kind, imageId, own) {
  const found = instances.get(imageId) || (own && own.get(imageId));
  if (!found || !found.ImagePositionPatient) return kind === 'instance' ? found : undefined;
  const axes = [...found.ImageOrientationPatient].map(Number);
  const spacing = [...found.PixelSpacing].map(Number);
  const series = { seriesInstanceUID: found.SeriesInstanceUID, studyInstanceUID: found.StudyInstanceUID };
  return {
    instance: found,
    generalSeriesModule: { ...series, modality: found.Modality },
    generalImageModule: { sopInstanceUID: found.SOPInstanceUID, instanceNumber: found.InstanceNumber },
    sopCommonModule: { sopInstanceUID: found.SOPInstanceUID, sopClassUID: found.SOPClassUID },
    imagePlaneModule: {
      rows: found.Rows,
      columns: found.Columns,
      imageOrientationPatient: axes,
      rowCosines: axes.slice(0, 3),
      columnCosines: axes.slice(3),
      imagePositionPatient: [...found.ImagePositionPatient].map(Number),
      rowPixelSpacing: spacing[0],
      columnPixelSpacing: spacing[1],
      pixelSpacing: spacing,
      frameOfReferenceUID: found.FrameOfReferenceUID,
    },
  }[kind];
}
metaData.provider = get;

// As OHIF and cornerstone sort a stack: along its normal.
function sortedImages() {
  const [first] = instances.values();
  const [a, b, c, d, e, f] = [...first.ImageOrientationPatient].map(Number);
  const normal = [b * f - c * e, c * d - a * f, a * e - b * d];
  const along = (each) => [...each.ImagePositionPatient].reduce((sum, mm, i) => sum + Number(mm) * normal[i], 0);
  return [...instances].sort(([, one], [, other]) => along(one) - along(other)).map(([imageId]) => imageId);
}

// A list of label maps for each image: several where segments overlap.
async function labelmaps(imageIds, bytes) {
  const own = new Map(); // the SEG itself
  const provider = {
    get: (kind, imageId) => get(kind, imageId, own),
    addCustomMetadata: (imageId, _, instance) => own.set(imageId, instance),
  };
  const { generateToolState, createFromDICOMSegBuffer } = adaptersSEG.Cornerstone3D.Segmentation;
  if (createFromDICOMSegBuffer) {
    const { labelMapImages } = await createFromDICOMSegBuffer(imageIds, bytes, { metadataProvider: provider });
    return labelMapImages.map((images) => images.map((image) => image.getPixelData()));
  }
  const { labelmapBufferArray } = await generateToolState(imageIds, bytes, provider);
  const { Rows, Columns } = instances.get(imageIds[0]);
  const size = Rows * Columns;
  return labelmapBufferArray.map((buffer) => imageIds.map((_, i) => new Uint8Array(buffer, i * size, size)));
}

async function read(path) {
  const imageIds = sortedImages();
  const maps = await labelmaps(imageIds, bytesOf(path));
  const labels = {};
  imageIds.forEach((imageId, index) => {
    const merged = Uint8Array.from(maps[0][index]);
    maps.slice(1).forEach((each) => each[index].forEach((value, at) => value && (merged[at] = value)));
    labels[imageId.slice('image:'.length)] = Buffer.from(merged).toString('base64');
  });
  return { labels };
}

// A promise that nothing keeps ends the process, and its SEG's line says so.
const answers = paths.map(() => ({ error: 'never finishes' }));
process.on('exit', () => writeFileSync(written, answers.map((each) => JSON.stringify(each) + '\n').join('')));
paths.forEach((path, index) =>
  read(path)
    .catch((error) => ({ error: String(error && error.message) }))
    .then((answer) => (answers[index] = answer)),
);
