// What ohif_session.py runs in OHIF's page, through the services and commands that OHIF itself uses.
window.pause = (ms) => new Promise((done) => setTimeout(done, ms));
window.until = async (what, limit_s = 40) => {
  const end = Date.now() + 1000 * limit_s;
  for (;;) {
    const found = await what();
    if (found) return found;
    if (Date.now() > end) return undefined;
    await pause(100);
  }
};
window.displaySetsOf = (modality) =>
  services.displaySetService.getActiveDisplaySets().filter((each) => each.Modality === modality);

window.base64 = (values) => {
  const bytes = Uint8Array.from(values);
  let text = '';
  bytes.forEach((byte) => (text += String.fromCharCode(byte)));
  return btoa(text);
};

// {SOPInstanceUID: base64 of a byte a pixel} of a segmentation that cornerstone has.
window.labelsOf = (segmentation) => {
  const { Labelmap } = segmentation.representationData;
  const labels = {};
  const ids = Labelmap.imageIds || cornerstone.cache.getVolume(Labelmap.volumeId).imageIds;
  for (const imageId of ids) {
    const image = cornerstone.cache.getImage(imageId);
    const { sopInstanceUID } = cornerstone.metaData.get('sopCommonModule', image.referencedImageId);
    const values = image.voxelManager ? image.voxelManager.getScalarData() : image.getPixelData();
    const known = labels[sopInstanceUID] || new Uint8Array(values.length);
    values.forEach((value, index) => value && (known[index] = value));
    labels[sopInstanceUID] = known;
  }
  return Object.fromEntries(Object.entries(labels).map(([uid, values]) => [uid, base64(values)]));
};

window.openSegmentation = async () => {
  const { viewportGridService, segmentationService } = services;
  const [set, ...others] = displaySetsOf('SEG');
  if (others.length) throw new Error('another SEG is in the study');
  const viewportId = viewportGridService.getActiveViewportId();
  viewportGridService.setDisplaySetsForViewport({ viewportId, displaySetInstanceUIDs: [set.displaySetInstanceUID] });
  const loaded = await until(() => segmentationService.getSegmentations().length && !set.loading, 15);
  if (!loaded) return { error: 'never finishes' };
  press('Yes'); // "Do you want to open this Segmentation?"
  await pause(1500);
  const [segmentation] = segmentationService.getSegmentations();
  return { labels: labelsOf(segmentation), segments: Object.keys(segmentation.segments) };
};

// What the page shows of a report: its measurements' labels, its text, and the list of measurements once it is loaded.
window.openReport = async () => {
  const { displaySetService, viewportGridService, measurementService } = services;
  const [set] = displaySetsOf('SR');
  const viewportId = viewportGridService.getActiveViewportId();
  viewportGridService.setDisplaySetsForViewport({ viewportId, displaySetInstanceUIDs: [set.displaySetInstanceUID] });
  if (!set.isLoaded && set.isImagingMeasurementReport) await until(() => set.isLoaded, 30);
  await pause(1500);
  const on = (each) => displaySetService.getDisplaySetByUID(each.displaySetInstanceUID);
  const report = {
    text: document.body.innerText,
    measurements: (set.measurements || []).map((each) => ({
      labels: each.labels.map(({ label, value }) => [label, value]),
      shown: each.loaded && on(each).Modality,
    })),
    listed: [],
  };
  if (set.isRehydratable) {
    commandsManager.runCommand('hydrateStructuredReport', { displaySetInstanceUID: set.displaySetInstanceUID });
    await until(() => measurementService.getMeasurements().length, 10);
    await pause(500);
    report.listed = measurementService.getMeasurements().map(({ label, points }) => ({ label, points }));
  }
  return report;
};

window.press = (text) => {
  const button = [...document.querySelectorAll('button, a, span')].find((each) => each.textContent.trim() === text);
  if (button) button.click();
  return !!button;
};

window.openStudy = async () => {
  const all = () => ['CT', 'SEG', 'SR'].every((each) => displaySetsOf(each).length);
  if (!(await until(all))) throw new Error('the study has no CT, SEG and SR');
  const { cornerstoneViewportService, viewportGridService } = services;
  await until(() => cornerstoneViewportService.getCornerstoneViewport(viewportGridService.getActiveViewportId()));
  await pause(1000);
  press('Skip all'); // the tour of the application
};
