// How the site's search ranks: as Sphinx does, but a guide comes before a reference that has the same words.
const REFERENCES = new Set(["api", "benchmarks", "planted-faults"]);
var Scorer = {
  objNameMatch: 11, objPartialMatch: 6, objPrio: { 0: 15, 1: 5, 2: -5 }, objPrioDefault: 0,
  title: 15, partialTitle: 7, term: 5, partialTerm: 2,
  score: ([page, title, anchor, description, score]) => (REFERENCES.has(page) ? score / 4 : score),
};
