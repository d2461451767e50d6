// Equations marked by pymdownx.arithmatex, \(…\) and \[…\], rendered by the KaTeX beside this file.
document.addEventListener("DOMContentLoaded", () => {
  for (const node of document.querySelectorAll(".arithmatex")) {
    const text = node.textContent.trim();
    katex.render(text.slice(2, -2), node, { displayMode: text.startsWith("\\["), throwOnError: false });
  }
});
