"use strict";
(() => {
  const element = (id) => document.getElementById(id);
  const data = JSON.parse(element("data").textContent);
  // Axes 0, 1, 2 run to the patient's left, posterior and superior.
  const shape = data.shape, stride = [1, shape[0], shape[0] * shape[1]];
  const voxels = stride[2] * shape[2];
  const codes = new Uint8Array(voxels), labels = new Uint8Array(voxels);
  const decoded = new Uint8Array(shape[2]); // which slices are decoded
  const spacing = [0, 1, 2].map((axis) => Math.hypot(...data.affine.map((row) => row[axis])));
  const state = { at: [...data.start], window: 0, outlines: true, cross: true, finding: -1, active: null };
  const panes = data.planes.map(makePane);
  state.active = panes[0];

  // --- what lies where ---------------------------------------------------------------------------------------------

  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
  const signed = (value) => (value < 0 ? "\u2212" : "+") + Math.abs(value).toFixed(1);
  const world = (index, row) => data.affine[row].reduce((sum, step, axis) => sum + step * (axis < 3 ? index[axis] : 1), 0);

  function placeOf(pane) {
    const middle = shape.map((count) => (count - 1) / 2);
    middle[pane.through] = state.at[pane.through];
    return `${pane.position} ${signed(world(middle, pane.through))} mm`;
  }

  /** Offset of a slice's first pixel, and the steps across and down the picture. */
  function walk(pane) {
    const down = stride[pane.down] * pane.sign;
    const first = state.at[pane.through] * stride[pane.through];
    return [pane.sign > 0 ? first : first - down * (pane.rows - 1), stride[pane.across], down];
  }

  // --- drawing -----------------------------------------------------------------------------------------------------

  function makePane(plane) {
    const pane = { ...plane, columns: shape[plane.across], rows: shape[plane.down], turned: 0 };
    const box = document.createElement("div"), label = document.createElement("label");
    pane.box = box;
    pane.canvas = document.createElement("canvas");
    pane.slider = document.createElement("input");
    pane.output = document.createElement("output");
    box.className = "pane";
    pane.canvas.id = `view-${plane.name}`;
    pane.canvas.tabIndex = 0;
    pane.canvas.setAttribute("role", "img");
    Object.assign(pane.slider, { type: "range", min: 0, max: shape[plane.through] - 1, step: 1 });
    label.append(`${plane.name[0].toUpperCase()}${plane.name.slice(1)}`, pane.slider, pane.output);
    box.append(pane.canvas, label);
    element("panes").append(box);
    pane.picture = document.createElement("canvas");
    Object.assign(pane.picture, { width: pane.columns, height: pane.rows });
    pane.pixels = new ImageData(pane.columns, pane.rows);
    return pane;
  }

  let lookup = [];
  function setWindow(number) {
    state.window = number;
    const { centre, width } = data.windows[number];
    lookup = data.hu.map((hu) => {
      const grey = Math.round(clamp((hu - centre + width / 2) / width, 0, 1) * 255);
      return ((255 << 24) | (grey << 16) | (grey << 8) | grey) >>> 0; // ABGR
    });
    document.querySelectorAll("[data-window]").forEach((button) => {
      button.setAttribute("aria-pressed", String(Number(button.dataset.window) === number));
    });
    drawSoon();
  }

  let asked = false;
  function drawSoon() {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => { asked = false; panes.forEach(draw); });
  }

  /** Where the picture lies on its canvas: left, top, and canvas pixels a voxel; voxels keep their shape. */
  function fit(pane) {
    const across = pane.columns * spacing[pane.across], down = pane.rows * spacing[pane.down];
    const scale = Math.min(pane.canvas.width / across, pane.canvas.height / down); // canvas pixels a millimetre
    return {
      left: (pane.canvas.width - across * scale) / 2, top: (pane.canvas.height - down * scale) / 2,
      x: scale * spacing[pane.across], y: scale * spacing[pane.down], scale,
    };
  }

  function draw(pane) {
    const canvas = pane.canvas, ratio = window.devicePixelRatio || 1;
    const width = Math.round(canvas.clientWidth * ratio), height = Math.round(canvas.clientHeight * ratio);
    if (!width || !height) return;
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    const pen = canvas.getContext("2d"), place = fit(pane);
    fillPicture(pane);
    pen.fillStyle = "#000";
    pen.fillRect(0, 0, width, height);
    pen.imageSmoothingQuality = "high";
    pen.drawImage(pane.picture, place.left, place.top, place.x * pane.columns, place.y * pane.rows);
    if (state.outlines) drawOutlines(pen, pane, place, ratio);
    if (state.cross) drawCross(pen, pane, place, ratio);
    drawWords(pen, pane, place, ratio);
    pane.slider.value = state.at[pane.through];
    pane.output.value = `${state.at[pane.through] + 1} / ${shape[pane.through]}`;
    const said = `slice ${state.at[pane.through] + 1} of ${shape[pane.through]}, ${placeOf(pane)}`;
    pane.slider.setAttribute("aria-valuetext", said);
    canvas.setAttribute("aria-label", `${pane.name} ${said}`);
    pane.box.classList.toggle("active", pane === state.active);
  }

  function fillPicture(pane) {
    const target = new Uint32Array(pane.pixels.data.buffer), [first, across, down] = walk(pane);
    let pixel = 0;
    for (let row = 0; row < pane.rows; row++) {
      let voxel = first + row * down;
      for (let column = 0; column < pane.columns; column++, voxel += across) target[pixel++] = lookup[codes[voxel]];
    }
    pane.picture.getContext("2d").putImageData(pane.pixels, 0, 0);
  }

  // Marching squares: for each pattern of the four pixels around a corner, the edges (top, right, bottom, left of the
  // square of pixel centres) that the outline joins.
  const JOINS = [[], [3, 0], [0, 1], [3, 1], [1, 2], [3, 0, 1, 2], [0, 2], [3, 2], [2, 3], [0, 2], [0, 1, 2, 3], [1, 2], [3, 1], [0, 1], [3, 0], []];
  const EDGES = [[1, 0.5], [1.5, 1], [1, 1.5], [0.5, 1]];

  function drawOutlines(pen, pane, place, ratio) {
    const [first, across, down] = walk(pane);
    const at = (row, column) =>
      row < 0 || column < 0 || row >= pane.rows || column >= pane.columns ? 0 : labels[first + row * down + column * across];
    pen.lineWidth = 2 * ratio;
    pen.lineJoin = pen.lineCap = "round";
    for (const [value, [top, bottom, left, right]] of extents(pane, at)) {
      pen.beginPath();
      for (let row = top - 1; row <= bottom; row++) {
        for (let column = left - 1; column <= right; column++) {
          const pattern = (at(row, column) === value) | ((at(row, column + 1) === value) << 1)
            | ((at(row + 1, column + 1) === value) << 2) | ((at(row + 1, column) === value) << 3);
          JOINS[pattern].forEach((edge, index) => {
            const x = place.left + (column + EDGES[edge][0]) * place.x, y = place.top + (row + EDGES[edge][1]) * place.y;
            if (index % 2) pen.lineTo(x, y); else pen.moveTo(x, y);
          });
        }
      }
      pen.strokeStyle = data.colours[(value - 1) % data.colours.length];
      pen.stroke();
    }
  }

  /** The label values of a slice, each with its first and last row and column. */
  function extents(pane, at) {
    const found = new Map();
    for (let row = 0; row < pane.rows; row++) {
      for (let column = 0; column < pane.columns; column++) {
        const value = at(row, column);
        if (!value) continue;
        const box = found.get(value) || [row, row, column, column];
        found.set(value, [box[0], row, Math.min(box[2], column), Math.max(box[3], column)]);
      }
    }
    return found;
  }

  /** The cross' middle on the canvas. */
  function crossOf(pane, place) {
    const column = state.at[pane.across], row = pane.sign > 0 ? state.at[pane.down] : pane.rows - 1 - state.at[pane.down];
    return [place.left + (column + 0.5) * place.x, place.top + (row + 0.5) * place.y];
  }

  function drawCross(pen, pane, place, ratio) {
    const [x, y] = crossOf(pane, place), gap = 14 * ratio; // what is looked at stays free
    const right = place.left + pane.columns * place.x, bottom = place.top + pane.rows * place.y;
    pen.strokeStyle = "rgba(108, 196, 255, 0.75)";
    pen.lineWidth = ratio;
    pen.beginPath();
    for (const [x0, y0, x1, y1] of [[place.left, y, x - gap, y], [x + gap, y, right, y], [x, place.top, x, y - gap], [x, y + gap, x, bottom]]) {
      if (x1 > x0 || y1 > y0) { pen.moveTo(x0, y0); pen.lineTo(x1, y1); }
    }
    pen.stroke();
  }

  function drawWords(pen, pane, place, ratio) {
    const { width, height } = pane.canvas, edge = 9 * ratio, [left, right, top, bottom] = pane.letters;
    const write = (words, x, y, align, baseline, size = 13) => {
      Object.assign(pen, { font: `${size * ratio}px system-ui, sans-serif`, textAlign: align, textBaseline: baseline });
      Object.assign(pen, { lineWidth: 3 * ratio, strokeStyle: "#000", fillStyle: "#eceef2", lineJoin: "round" });
      pen.strokeText(words, x, y);
      pen.fillText(words, x, y);
    };
    write(left, edge, height / 2, "left", "middle", 16);
    write(right, width - edge, height / 2, "right", "middle", 16);
    write(top, width / 2, edge, "center", "top", 16);
    write(bottom, width / 2, height - edge, "center", "bottom", 16);
    const { centre, width: wide } = data.windows[state.window];
    write(placeOf(pane), edge, edge, "left", "top");
    write(`W ${wide}  C ${String(centre).replace("-", "\u2212")}`, width - edge, edge, "right", "top");
    const code = codes[state.at.reduce((sum, index, axis) => sum + index * stride[axis], 0)];
    const hu = `\u2248 ${String(Math.round(data.hu[code] / 10) * 10).replace("-", "\u2212")} HU`;
    if (decoded[state.at[2]]) write(hu, width - edge, height - edge, "right", "bottom");
    const whole = pane.through === 2 ? decoded[state.at[2]] : decoded.every(Boolean);
    if (!whole) write("loading \u2026", width / 2, height / 2, "center", "middle", 16); // not yet a picture of air
    const length = [100, 50, 20, 10, 5].find((mm) => mm * place.scale < width * 0.35) || 5;
    write(`${length} mm`, edge, height - edge - 7 * ratio, "left", "bottom");
    pen.fillRect(edge, height - edge - 2 * ratio, length * place.scale, 2 * ratio);
  }

  // --- what a person does ------------------------------------------------------------------------------------------

  function goTo(axis, index) {
    state.at[axis] = clamp(Math.round(index), 0, shape[axis] - 1);
    drawSoon();
  }

  function choose(finding) {
    state.finding = (finding + data.findings.length) % data.findings.length;
    state.at = [...data.findings[state.finding]];
    document.querySelectorAll("[data-finding]").forEach((button) => {
      const row = button.closest("tr");
      if (Number(button.dataset.finding) === state.finding) row.setAttribute("aria-current", "true");
      else row.removeAttribute("aria-current");
    });
    drawSoon();
  }

  function toggle(name, button) {
    state[name] = !state[name];
    button.setAttribute("aria-pressed", String(state[name]));
    drawSoon();
  }

  function enlarge() {
    element("panes").classList.toggle("enlarged");
    drawSoon();
  }

  const step = (by) => choose(state.finding < 0 && by < 0 ? -1 : state.finding + by);
  const press = (id) => () => { if (!element(id).disabled) element(id).click(); };
  const shortcuts = { o: press("outlines"), x: press("cross"), n: press("next"), p: press("previous"), f: enlarge };
  data.windows.forEach((_, index) => { shortcuts[index + 1] = () => setWindow(index); });
  const moves = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 10, PageDown: -10, Home: -Infinity, End: Infinity };

  function onKey(event) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const onView = event.target instanceof HTMLCanvasElement || event.target === document.body;
    const { through } = state.active, action = shortcuts[event.key.toLowerCase()];
    if (onView && event.key in moves) goTo(through, clamp(state.at[through] + moves[event.key], 0, shape[through]));
    else if (action) action();
    else return;
    event.preventDefault();
  }

  function onWheel(pane, event) {
    if (event.ctrlKey) return; // the browser's own zoom
    event.preventDefault();
    activate(pane);
    // A notch of a mouse is one slice; the many small steps of a touchpad add up.
    const notch = event.deltaMode !== 0 || Math.abs(event.deltaY) >= 50;
    pane.turned = notch ? Math.sign(event.deltaY) * 30 : pane.turned + event.deltaY;
    if (Math.abs(pane.turned) < 30) return;
    goTo(pane.through, state.at[pane.through] - Math.sign(pane.turned));
    pane.turned = 0;
  }

  function onPoint(pane, event) {
    if (!(event.buttons & 1)) return;
    activate(pane);
    const place = fit(pane), ratio = pane.canvas.width / pane.canvas.clientWidth;
    const row = Math.floor((event.offsetY * ratio - place.top) / place.y);
    goTo(pane.across, Math.floor((event.offsetX * ratio - place.left) / place.x));
    goTo(pane.down, pane.sign > 0 ? row : pane.rows - 1 - row);
  }

  function activate(pane) {
    state.active = pane;
    drawSoon();
  }

  function listen() {
    panes.forEach((pane) => {
      pane.canvas.addEventListener("wheel", (event) => onWheel(pane, event), { passive: false });
      pane.canvas.addEventListener("pointerdown", (event) => { pane.canvas.setPointerCapture(event.pointerId); onPoint(pane, event); });
      pane.canvas.addEventListener("pointermove", (event) => onPoint(pane, event));
      pane.canvas.addEventListener("dblclick", enlarge);
      pane.box.addEventListener("focusin", () => activate(pane));
      pane.slider.addEventListener("input", () => goTo(pane.through, Number(pane.slider.value)));
    });
    document.addEventListener("keydown", onKey);
    document.querySelectorAll("[data-window]").forEach((button) => {
      button.addEventListener("click", () => setWindow(Number(button.dataset.window)));
    });
    document.querySelectorAll("[data-finding]").forEach((button) => {
      button.closest("tr").addEventListener("click", () => choose(Number(button.dataset.finding)));
    });
    element("outlines").addEventListener("click", (event) => toggle("outlines", event.currentTarget));
    element("cross").addEventListener("click", (event) => toggle("cross", event.currentTarget));
    element("next").addEventListener("click", () => step(1));
    element("previous").addEventListener("click", () => step(-1));
    element("next").disabled = element("previous").disabled = !data.findings.length;
    new ResizeObserver(drawSoon).observe(element("panes"));
  }

  // --- reading -----------------------------------------------------------------------------------------------------

  function bytesOf(text) {
    if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
    const letters = atob(text), bytes = new Uint8Array(letters.length);
    for (let index = 0; index < bytes.length; index++) bytes[index] = letters.charCodeAt(index);
    return bytes;
  }

  async function readLabels() {
    const stream = new Blob([bytesOf(data.runs)]).stream().pipeThrough(new DecompressionStream("deflate"));
    const runs = new Uint32Array(await new Response(stream).arrayBuffer());
    for (let run = 0; run < runs.length; run += 3) labels.fill(runs[run + 2], runs[run], runs[run] + runs[run + 1]);
  }

  async function readSlice(index, pen) {
    const blob = new Blob([bytesOf(data.slices[index])], { type: "image/jpeg" });
    data.slices[index] = null;
    const bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none" });
    pen.drawImage(bitmap, 0, 0);
    bitmap.close();
    const pixels = pen.getImageData(0, 0, shape[0], shape[1]).data, first = index * stride[2];
    for (let pixel = 0; pixel < stride[2]; pixel++) codes[first + pixel] = pixels[4 * pixel];
    decoded[index] = 1;
  }

  /** All slices, the nearest to what is looked at first. */
  async function readSlices() {
    const surface = document.createElement("canvas");
    Object.assign(surface, { width: shape[0], height: shape[1] });
    const pen = surface.getContext("2d", { willReadFrequently: true });
    const order = [...Array(shape[2]).keys()].sort((a, b) => Math.abs(a - data.start[2]) - Math.abs(b - data.start[2]));
    for (let done = 0; done < order.length; done += 8) {
      await Promise.all(order.slice(done, done + 8).map((index) => readSlice(index, pen)));
      if (done === 0) checkSlice();
      element("loading").value = done / order.length;
      drawSoon();
    }
  }

  function checkSlice() {
    const first = data.check.slice * stride[2];
    const mean = codes.subarray(first, first + stride[2]).reduce((sum, code) => sum + code, 0) / stride[2];
    if (Math.abs(mean - data.check.mean) > 3) {
      throw new Error("This browser alters pictures that a page reads (protection against fingerprinting). Allow canvas data for this page.");
    }
  }

  async function start() {
    listen();
    setWindow(0);
    if (data.first >= 0) choose(data.first);
    try {
      if (!window.DecompressionStream) throw new Error("This browser is too old; those of 2023 and later can.");
      await readLabels();
      await readSlices();
      document.body.dataset.state = "ready";
    } catch (error) {
      document.body.dataset.state = "failed";
      element("panes").hidden = true; // no picture is better than a wrong one
      element("problem").hidden = false;
      element("problem").textContent = `The slices cannot be shown. ${error.message}`;
    }
    element("loading").hidden = true;
    drawSoon();
  }

  start();
})();
