{
  const get = (id) => document.getElementById(id);
  const sheet = get("sheet"), slider = get("column"), shown = document.querySelector("#controls output");
  const figures = [...sheet.querySelectorAll("figure")], last = Number(slider.max);
  const label = (figure) => figure.querySelector("figcaption b").textContent;

  const show = (column) => {
    slider.value = column;
    sheet.classList.toggle("one", column > 0);
    for (const figure of figures) figure.classList.toggle("shown", Number(figure.dataset.column) === column);
    const text = column ? label(figures[column - 1]) : "all";
    shown.textContent = column ? `${text} (${column} of ${last})` : "all";
    slider.setAttribute("aria-valuetext", shown.textContent);
    pixels();
  };
  const pixels = () => {  // a small picture shown large keeps its pixels
    for (const img of document.querySelectorAll("#sheet img, #pair img"))
      img.parentElement.classList.toggle("pixels", img.clientWidth >= 3 * img.naturalWidth);
  };
  slider.addEventListener("input", () => show(Number(slider.value)));
  get("controls").hidden = last < 2;
  document.addEventListener("keydown", (event) => {
    const free = event.target === document.body || event.target.classList.contains("picture");
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || !free || last < 2 || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    show(Math.min(last, Math.max(0, Number(slider.value) + step)));
  });
  addEventListener("resize", pixels);
  addEventListener("load", pixels);
  show(matchMedia("(max-width: 640px)").matches && last > 1 ? 1 : 0);

  // two pictures, one over the other
  const dialog = get("compare"), stage = get("stage"), pair = get("pair"), grip = get("grip"), wipe = get("wipe");
  const chosen = get("chosen");
  let pictures = [], zoom = 1;
  const choose = (button) => {
    const already = pictures.indexOf(button);
    pictures = already < 0 ? [...pictures, button] : pictures.filter((one) => one !== button);
    button.setAttribute("aria-pressed", String(already < 0));
    chosen.replaceChildren();
    if (pictures.length === 1) {
      const cancel = Object.assign(document.createElement("button"), { type: "button", textContent: "Cancel" });
      cancel.addEventListener("click", () => { pictures[0].focus(); choose(pictures[0]); });
      chosen.append(`Picture ${pictures[0].dataset.number} is chosen: click another one to compare.`, cancel);
    }
    if (pictures.length === 2) compare();
  };
  for (const button of sheet.querySelectorAll("button.picture")) button.addEventListener("click", () => choose(button));

  const table = document.querySelector("table.sortable");
  const cells = (number) => {
    const row = [...table.tBodies[0].rows].find((one) => one.cells[0].textContent === number);
    return [...row.cells].map((cell) => cell.textContent);
  };
  const compare = () => {
    const images = pictures.map((button) => button.querySelector("img"));
    [get("under"), get("over")].forEach((img, which) => { img.src = images[which].src; img.alt = images[which].alt; });
    pair.style.setProperty("--ratio", images[0].naturalWidth / images[0].naturalHeight);
    const names = [...table.tHead.rows[0].cells].map((head) => head.textContent);
    const [left, right] = pictures.map((button) => cells(button.dataset.number));
    const rows = names.map((name, at) => [name, left[at], right[at]]).filter(([, a, b], at) => at === 0 || a !== b);
    get("differences").tBodies[0].replaceChildren(...rows.map((texts) => {
      const row = document.createElement("tr");
      texts.forEach((text) => { row.insertCell().textContent = text; });
      return row;
    }));
    if (!dialog.open) { dialog.showModal(); place(50); resize(1); wipe.focus(); }
  };
  const place = (percent) => {
    wipe.value = percent;
    pair.style.setProperty("--wipe", `${wipe.value}%`);
    wipe.setAttribute("aria-valuetext", `${Math.round(wipe.value)} % left, the rest right`);
  };
  const at = (event) => {
    const box = pair.getBoundingClientRect();
    place(100 * (event.clientX - box.left) / box.width);
  };
  const resize = (next) => {
    const x = (stage.scrollLeft + stage.clientWidth / 2) / stage.scrollWidth;
    const y = (stage.scrollTop + stage.clientHeight / 2) / stage.scrollHeight;
    zoom = Math.min(16, Math.max(1, next));
    pair.style.setProperty("--zoom", zoom);
    stage.scrollTo(x * stage.scrollWidth - stage.clientWidth / 2, y * stage.scrollHeight - stage.clientHeight / 2);
    get("zoom").textContent = `${zoom}×`;
    get("smaller").disabled = zoom === 1;
    get("larger").disabled = zoom === 16;
    pixels();
  };
  wipe.addEventListener("input", () => place(Number(wipe.value)));
  pair.addEventListener("click", at);
  grip.addEventListener("pointerdown", (event) => { event.preventDefault(); grip.setPointerCapture(event.pointerId); });
  grip.addEventListener("pointermove", (event) => { if (grip.hasPointerCapture(event.pointerId)) at(event); });
  get("swap").addEventListener("click", () => { pictures.reverse(); compare(); });
  get("larger").addEventListener("click", () => resize(zoom * 2));
  get("smaller").addEventListener("click", () => resize(zoom / 2));
  get("close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "+" || event.key === "=") resize(zoom * 2);
    if (event.key === "-") resize(zoom / 2);
  });
  dialog.addEventListener("close", () => {
    const back = pictures[1] || pictures[0];
    for (const button of pictures) button.setAttribute("aria-pressed", "false");
    pictures = [];
    back.focus();
  });
}
