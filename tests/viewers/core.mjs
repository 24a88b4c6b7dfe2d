// What the adapters import from @cornerstonejs/core and tools, which need a browser: a label map for each image.
import { utilities as shared } from '@cornerstonejs/metadata';
import { asArray } from '@cornerstonejs/utils';

const named = (path) => new Proxy({}, { get: (_, key) => (typeof key === 'string' ? key : undefined) });
export const Enums = new Proxy({}, { get: (_, key) => named(key) });
export const imageLoader = {
  createAndCacheDerivedLabelmapImage(referencedImageId) {
    const { Rows, Columns } = metaData.get('instance', referencedImageId);
    const values = new Uint8Array(Rows * Columns);
    const pixels = () => values;
    const setAtIndex = (index, value) => (values[index] = value);
    const voxelManager = { setAtIndex, getScalarData: pixels, getWritableScalarData: pixels };
    return { referencedImageId, getPixelData: pixels, voxelManager };
  },
};
export const utilities = {
  ...shared,
  asArray,
  contours: {},
  logger: shared,
  voxelSlab: {
    signedDistanceToPlane: (point, on, normal) => point.reduce((sum, mm, i) => sum + (mm - on[i]) * normal[i], 0),
  },
  throttle: (call) => call,
  FrameRange: { imageIdToFrameStart: () => 1 },
};
export const cache = {};
export const annotation = {};
export const eventTarget = {};
export const triggerEvent = () => true;
export const metaData = {
  addProvider: () => undefined,
  provider: () => undefined,
  get: (kind, imageId) => metaData.provider(kind, imageId),
};
