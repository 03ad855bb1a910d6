// Validates an AsyncAPI document. Prints each finding; errors and warnings fail.

const { readFileSync } = require("node:fs");
const { Parser } = require("@asyncapi/parser");

const INFORMATION = 2;

const validate = async (file) => {
  const findings = await new Parser().validate(readFileSync(file, "utf8"));
  for (const { severity, path, message } of findings) console.error(`${severity} ${path.join("/")}: ${message}`);
  const bad = findings.filter(({ severity }) => severity < INFORMATION);
  console.log(`${file}: ${bad.length ? "not valid" : "valid"}`);
  process.exitCode = bad.length ? 1 : 0;
};

validate(process.argv[2]);
