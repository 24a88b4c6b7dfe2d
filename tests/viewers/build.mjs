// Bundles read.mjs with each version of the adapters into build/: they are written for a browser's bundler.
import { build } from 'esbuild';
import { readFileSync } from 'node:fs';

const { dependencies } = JSON.parse(readFileSync('package.json'));
for (const name of Object.keys(dependencies).filter((each) => each.startsWith('adapters-'))) {
  const entry = name === 'adapters-1.32.2' ? `./node_modules/${name}/dist/adapters.es.js` : name;
  await build({
    entryPoints: ['read.mjs'],
    outfile: `build/${name}.cjs`,
    bundle: true,
    platform: 'node',
    target: 'node18',
    logLevel: 'error',
    mainFields: ['module', 'main'],
    alias: { adapters: entry, '@cornerstonejs/core': './core.mjs', '@cornerstonejs/tools': './core.mjs' },
  });
}
