// Checks the documents: every relative link leads to a file and a heading, and the decisions are numbered without gaps, have at
// most 25 lines, and are all in their index. Prints each problem.

import { execFileSync } from "node:child_process";
import { existsSync, readFileSync } from "node:fs";
import { dirname, join, normalize } from "node:path";

const LONGEST_DECISION = 25;
const tracked = execFileSync("git", ["ls-files", "-z", "*.md"], { encoding: "utf8" }).split("\0").filter(Boolean);
const problems = [];

/** Without blocks of code. @param {string} file */
const prose = (file) => readFileSync(file, "utf8").replace(/^```[^]*?^```/gm, "");

/** The anchors of a page, as GitHub makes them. @param {string} file */
const anchors = (file) =>
  [...prose(file).matchAll(/^#+ (.*)$/gm)].map(([, heading]) =>
    heading.replace(/\[([^\]]*)\]\([^)]*\)/g, "$1").toLowerCase().replace(/[^\p{L}\p{N}_ -]/gu, "").replaceAll(" ", "-"));

for (const file of tracked) {
  for (const [, target] of prose(file).matchAll(/\]\(([^)\s]+)\)/g)) {
    if (/^[a-z]+:/.test(target)) continue;
    const [path, anchor] = target.split("#");
    const page = path ? normalize(join(dirname(file), path)) : file;
    if (!existsSync(page)) problems.push(`${file}: ${target} does not exist`);
    else if (anchor && !anchors(page).includes(anchor)) problems.push(`${file}: ${page} has no heading #${anchor}`);
  }
}

const folder = "docs/decisions/";
const decisions = tracked.filter((file) => file.startsWith(folder) && !file.endsWith("README.md")).sort();
const index = readFileSync(`${folder}README.md`, "utf8");
decisions.forEach((file, at) => {
  const number = String(at + 1).padStart(4, "0");
  const text = readFileSync(file, "utf8");
  const name = file.slice(folder.length);
  if (!name.startsWith(`${number}-`)) problems.push(`${file}: its number should be ${number}`);
  if (!/^# \d{4}: [^:\n]+: .+\n/.test(text) || text.slice(2, 6) !== number) problems.push(`${file}: the title is not "# ${number}: subject: decision"`);
  if (text.trimEnd().split("\n").length > LONGEST_DECISION) problems.push(`${file}: over ${LONGEST_DECISION} lines`);
  if (!index.includes(`(${name})`)) problems.push(`${folder}README.md: ${name} is missing`);
});

for (const problem of problems) console.error(problem);
process.exitCode = problems.length ? 1 : 0;
