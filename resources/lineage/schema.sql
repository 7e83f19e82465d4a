-- The lineage index: what was made from what, with which settings, and how well it did.
--
-- An index over the home folder: the manifests and tables in `artifacts/`, the records in `runs/`, `current/`,
-- `releases/`, and the votes in `feedback/`. Those are the truth; the index can be deleted at any time and is made again,
-- row for row the same, by `align lineage rebuild`.
--
-- `artifact_id` is the artifact's folder below `artifacts/`: stage/key/data version, hashes cut to 20 digits. Times are
-- UTC. JSON columns are read with ->> : config->>'learning_rate'. Foreign keys hold: what an artifact was made from is a
-- row of `artifacts`, even where its folder is gone (`in_store` is false then, and only its name is known).
--
-- How this file changes: tables change in a new section `-- migration N: why`, never in an old one. An index made before
-- gets the sections it lacks. A section whose new tables or columns are filled from the home folder has the line
-- `-- rebuild`, and the index is made anew. The views stand last and are replaced whenever their text has changed.

-- migration 1: every table

CREATE TABLE schema_sections (
    section VARCHAR PRIMARY KEY, -- "1", "2", ... or "views"
    sha256  VARCHAR NOT NULL     -- of the section's text
);

-- One row a file that has been read. stamp (inode:size:time) tells whether it has changed since.
CREATE TABLE indexed_files (
    path    VARCHAR PRIMARY KEY,  -- below the home folder
    stamp   VARCHAR NOT NULL,
    problem VARCHAR               -- why it is malformed, and nothing else of it is indexed; else NULL
);

-- One row an artifact: what was computed (key, code, config, seed), what came out (data_version), and where and when.
CREATE TABLE artifacts (
    artifact_id  VARCHAR PRIMARY KEY,
    stage        VARCHAR NOT NULL,
    key          VARCHAR NOT NULL,
    data_version VARCHAR NOT NULL,
    in_store     BOOLEAN NOT NULL, -- false: its folder is gone, only the columns above are known
    code_version VARCHAR,
    code         JSON,      -- {"alignment_pipeline.stages.sft_model": digest, ...}, every module that counts
    config       JSON,
    seed         BIGINT,
    created_at   TIMESTAMP,
    wall_s       DOUBLE,
    git_commit   VARCHAR,   -- with a + for uncommitted changes
    device       VARCHAR,
    python       VARCHAR,
    packages     JSON,      -- {"torch": "2.13.0", ...}
    timings      JSON       -- seconds
);

-- Edges: artifact_id was computed from input_artifact_id, which it knows under a name ("dataset", "policy").
CREATE TABLE artifact_inputs (
    artifact_id       VARCHAR NOT NULL REFERENCES artifacts (artifact_id),
    name              VARCHAR NOT NULL,
    input_artifact_id VARCHAR NOT NULL REFERENCES artifacts (artifact_id),
    PRIMARY KEY (artifact_id, name)
);

-- Files from outside the store that a stage read, by content.
CREATE TABLE input_files (
    artifact_id VARCHAR NOT NULL REFERENCES artifacts (artifact_id),
    name        VARCHAR NOT NULL,
    sha256      VARCHAR NOT NULL,
    path        VARCHAR, -- where it lay then
    PRIMARY KEY (artifact_id, name)
);

-- Files of an artifact; paths are relative to its folder. `align gc` may have deleted weights since.
CREATE TABLE artifact_files (
    artifact_id VARCHAR NOT NULL REFERENCES artifacts (artifact_id),
    path        VARCHAR NOT NULL,
    size        BIGINT,     -- bytes
    sha256      VARCHAR,
    PRIMARY KEY (artifact_id, path)
);

-- Metrics while a stage ran, from its progress log; steps count within a phase.
CREATE TABLE metrics (
    artifact_id VARCHAR NOT NULL REFERENCES artifacts (artifact_id),
    phase       VARCHAR NOT NULL,
    step        BIGINT NOT NULL,
    name        VARCHAR NOT NULL,
    value       DOUBLE
);

-- Final metrics of an artifact.
CREATE TABLE results (
    artifact_id VARCHAR NOT NULL REFERENCES artifacts (artifact_id),
    name        VARCHAR NOT NULL,
    value       DOUBLE,
    PRIMARY KEY (artifact_id, name)
);

-- Propositions about an artifact that were checked when it was made.
CREATE TABLE checks (
    artifact_id VARCHAR NOT NULL REFERENCES artifacts (artifact_id),
    name        VARCHAR NOT NULL,
    passed      BOOLEAN NOT NULL,
    detail      VARCHAR,
    blocking    BOOLEAN,
    PRIMARY KEY (artifact_id, name)
);

-- Rows of an `instructions` artifact. row_id is the hash of the row's content: the same row has the same id everywhere.
CREATE TABLE dataset_rows (
    artifact_id VARCHAR NOT NULL REFERENCES artifacts (artifact_id),
    row_id      VARCHAR NOT NULL,
    prompt_id   VARCHAR NOT NULL,
    split       VARCHAR NOT NULL,   -- train, validation or test
    source      VARCHAR,            -- the file's path, "hub NAME at COMMIT", or "world"
    source_line BIGINT,             -- line or record, from 1
    instruction VARCHAR,
    input       VARCHAR,
    output      VARCHAR
);

-- Rows of its `instructions` that a `formatted_dataset` left out: whatever reads it has not seen them.
CREATE TABLE dropped_rows (
    artifact_id VARCHAR NOT NULL REFERENCES artifacts (artifact_id),
    row_id      VARCHAR NOT NULL,
    reason      VARCHAR
);

-- Prompts of plain texts (`data.text_field`): their beginnings, which a `formatted_dataset` has cut off. Everything after it
-- knows such a prompt by this id, and `dataset_rows` has the whole text's.
CREATE TABLE formatted_prompts (
    artifact_id VARCHAR NOT NULL REFERENCES artifacts (artifact_id),
    row_id      VARCHAR NOT NULL,
    prompt_id   VARCHAR NOT NULL
);

-- Input rows that a stage refused, and why.
CREATE TABLE quarantined_rows (
    artifact_id VARCHAR NOT NULL REFERENCES artifacts (artifact_id),
    reason      VARCHAR,
    source_line BIGINT,
    detail      VARCHAR
);

-- Preference pairs. Those of `preference_pairs` have a split; those of `human_preferences` are not divided yet.
CREATE TABLE preference_pairs (
    artifact_id    VARCHAR NOT NULL REFERENCES artifacts (artifact_id),
    split          VARCHAR,    -- train, validation or NULL
    pair_id        VARCHAR NOT NULL,
    prompt_id      VARCHAR NOT NULL,
    prompt         VARCHAR,
    chosen         VARCHAR,
    rejected       VARCHAR,
    source         VARCHAR,    -- dataset (the dataset's answer against a sample), sampled (both) or human
    labeller       VARCHAR,    -- a rule's or judge's name, or a person's
    chosen_score   DOUBLE,     -- NULL unless a rule scored
    rejected_score DOUBLE
);

-- Responses sampled while PPO trained, each with the score that it was rewarded by.
CREATE TABLE rollouts (
    artifact_id   VARCHAR NOT NULL REFERENCES artifacts (artifact_id),
    update_number BIGINT NOT NULL,  -- from 1
    prompt_id     VARCHAR NOT NULL,
    prompt        VARCHAR,
    response      VARCHAR,
    score         DOUBLE,
    kl_nats       DOUBLE,           -- from the reference policy, as sampled
    tokens        BIGINT,
    ended         BOOLEAN           -- by itself, not at the length limit
);

-- One row an `evaluation` artifact: which policy was judged by what, on how many prompts.
CREATE TABLE evaluations (
    artifact_id        VARCHAR PRIMARY KEY REFERENCES artifacts (artifact_id),
    policy_artifact_id VARCHAR REFERENCES artifacts (artifact_id),
    judge              VARCHAR,
    prompts            BIGINT
);

-- Responses of an evaluated policy with their scores and decoding settings.
CREATE TABLE evaluation_examples (
    artifact_id   VARCHAR NOT NULL REFERENCES artifacts (artifact_id),
    prompt_id     VARCHAR NOT NULL,
    prompt        VARCHAR,
    reference     VARCHAR,
    response      VARCHAR,
    judge         VARCHAR,
    judge_score   DOUBLE,
    learned_score DOUBLE,   -- NULL where there is no reward model
    kl_nats       DOUBLE,
    tokens        BIGINT,
    ended         BOOLEAN,  -- the response ended by itself, not at the length limit
    temperature   DOUBLE
);

-- Cells of a `comparison` artifact's table, one row a policy and column. Text cells have no value, numbers no text.
CREATE TABLE comparison_rows (
    artifact_id VARCHAR NOT NULL REFERENCES artifacts (artifact_id),
    policy      VARCHAR NOT NULL,
    judge       VARCHAR,
    name        VARCHAR NOT NULL,
    value       DOUBLE,
    text        VARCHAR,
    PRIMARY KEY (artifact_id, policy, name)
);

-- One row a run record.
CREATE TABLE runs (
    run_id      VARCHAR PRIMARY KEY,
    recipe      VARCHAR NOT NULL,
    overrides   JSON,       -- ["dpo.beta=0.1", ...]
    started_by  VARCHAR,
    started_at  TIMESTAMP,
    finished_at TIMESTAMP,  -- NULL while it runs
    status      VARCHAR     -- running, success, failed or interrupted
);

-- What each asset was in a run: made by it, or reused.
CREATE TABLE run_assets (
    run_id      VARCHAR NOT NULL REFERENCES runs (run_id),
    asset       VARCHAR NOT NULL,
    artifact_id VARCHAR NOT NULL REFERENCES artifacts (artifact_id),
    reused      BOOLEAN,
    PRIMARY KEY (run_id, asset)
);

-- What each asset of a recipe is now: what `align results` and `align chat` read.
CREATE TABLE current_assets (
    recipe      VARCHAR NOT NULL,
    asset       VARCHAR NOT NULL,
    artifact_id VARCHAR NOT NULL REFERENCES artifacts (artifact_id),
    PRIMARY KEY (recipe, asset)
);

-- Policies that were released.
CREATE TABLE releases (
    release_id  VARCHAR PRIMARY KEY,
    recipe      VARCHAR NOT NULL,
    asset       VARCHAR NOT NULL,
    artifact_id VARCHAR NOT NULL REFERENCES artifacts (artifact_id),
    released_at TIMESTAMP,
    released_by VARCHAR,
    note        VARCHAR
);

-- Every vote that was taken in, as it came, good or bad. What became of it is in `preference_pairs` (source human) and
-- `quarantined_rows` (source_line = line).
CREATE TABLE feedback (
    recipe   VARCHAR NOT NULL,
    line     BIGINT NOT NULL,   -- of the recipe's journal, from 1
    prompt   VARCHAR,           -- the prompt or instruction voted on
    chosen   VARCHAR,
    rejected VARCHAR,
    labeller VARCHAR,
    vote     VARCHAR NOT NULL,  -- the line itself
    PRIMARY KEY (recipe, line)
);

-- migration 2: how an evaluation's responses were decoded, and the other response of preference data
-- rebuild

ALTER TABLE evaluation_examples ADD COLUMN decoding VARCHAR; -- "temperature 0.7, top-p 0.9, up to 64 tokens"

-- NULL for rows of other data. An output is the chosen response where it is not. Where `source` begins with "a query
-- over", `source_line` is the row of the query's result.
ALTER TABLE dataset_rows ADD COLUMN rejected VARCHAR;

-- migration 3: held-out pairs as a reward model scores them
-- rebuild

-- One row a held-out pair of a `reward_model`; pairs that were too long for it are in `dropped_rows`. The shuffled scores are those of the responses to another pair's prompt,
-- NULL where all held-out pairs have one prompt.
CREATE TABLE pair_scores (
    artifact_id             VARCHAR NOT NULL REFERENCES artifacts (artifact_id),
    pair_id                 VARCHAR NOT NULL,
    prompt_id               VARCHAR NOT NULL,
    chosen_score            DOUBLE,
    rejected_score          DOUBLE,
    margin                  DOUBLE,  -- chosen_score - rejected_score
    shuffled_chosen_score   DOUBLE,
    shuffled_rejected_score DOUBLE
);

-- views

-- Everything an artifact was made from, however far back; the shortest way counts. Read the other way round
-- (WHERE ancestor_id = ...) it says everything that was made from an artifact.
CREATE OR REPLACE VIEW ancestors AS
WITH RECURSIVE walk (artifact_id, ancestor_id, depth) AS (
    SELECT artifact_id, input_artifact_id, 1 FROM artifact_inputs
    UNION
    SELECT walk.artifact_id, edge.input_artifact_id, walk.depth + 1
    FROM walk JOIN artifact_inputs AS edge ON edge.artifact_id = walk.ancestor_id
)
SELECT artifact_id, ancestor_id, min(depth) AS depth FROM walk GROUP BY artifact_id, ancestor_id;

-- Settings, seeds and code behind an artifact: itself (depth 0) and all its ancestors.
CREATE OR REPLACE VIEW provenance AS
WITH family AS (
    SELECT artifact_id, ancestor_id, depth FROM ancestors
    UNION ALL
    SELECT artifact_id, artifact_id, 0 FROM artifacts
)
SELECT family.artifact_id, family.depth, family.ancestor_id, made.stage, made.config, made.seed, made.code_version,
       made.git_commit, made.device, made.packages, made.created_at
FROM family JOIN artifacts AS made ON made.artifact_id = family.ancestor_id;

-- Which artifact each asset of a recipe is: in a run, or now (run_id is 'current').
CREATE OR REPLACE VIEW recipe_assets AS
SELECT runs.recipe, run_assets.run_id, run_assets.asset, run_assets.artifact_id
FROM run_assets JOIN runs ON runs.run_id = run_assets.run_id
UNION ALL
SELECT recipe, 'current', asset, artifact_id FROM current_assets;

-- Every number of a recipe and the artifact it is a result of: final metrics of each asset, and the comparison's table.
-- policy is what the number is about: of an evaluation the policy's stage, else the asset.
CREATE OR REPLACE VIEW numbers AS
SELECT ra.recipe, ra.run_id, ra.asset, coalesce(split_part(evaluations.policy_artifact_id, '/', 1), ra.asset) AS policy,
       results.name AS metric, results.value, ra.artifact_id
FROM recipe_assets AS ra
JOIN results ON results.artifact_id = ra.artifact_id
LEFT JOIN evaluations ON evaluations.artifact_id = ra.artifact_id
WHERE ra.asset <> 'comparison'
UNION ALL
SELECT ra.recipe, ra.run_id, ra.asset, cells.policy, 'eval/' || cells.name, cells.value, ra.artifact_id
FROM recipe_assets AS ra
JOIN comparison_rows AS cells ON cells.artifact_id = ra.artifact_id
WHERE cells.value IS NOT NULL;

-- Paired prompts of a comparison: each policy's score against the opponent's on the same prompt. The mean of `win` is the
-- win rate, counted from the rows.
CREATE OR REPLACE VIEW paired_examples AS
SELECT cells.artifact_id, cells.policy, cells.text AS opponent, ours.prompt_id, ours.prompt, ours.response,
       theirs.response AS opponent_response, ours.judge_score, theirs.judge_score AS opponent_score,
       CASE WHEN ours.judge_score > theirs.judge_score THEN 1.0
            WHEN ours.judge_score = theirs.judge_score THEN 0.5 ELSE 0.0 END AS win
FROM comparison_rows AS cells
JOIN artifact_inputs AS our_edge ON our_edge.artifact_id = cells.artifact_id AND our_edge.name = cells.policy
JOIN artifact_inputs AS their_edge ON their_edge.artifact_id = cells.artifact_id AND their_edge.name = cells.text
JOIN evaluation_examples AS ours ON ours.artifact_id = our_edge.input_artifact_id
JOIN evaluation_examples AS theirs
  ON theirs.artifact_id = their_edge.input_artifact_id AND theirs.prompt_id = ours.prompt_id
WHERE cells.name = 'opponent';

-- The ids that a row's prompt is known by: a plain text has one as a whole, and one for each way its beginning was cut off.
CREATE OR REPLACE VIEW row_prompts AS
SELECT row_id, prompt_id, artifact_id FROM dataset_rows
UNION ALL
SELECT row_id, prompt_id, artifact_id FROM formatted_prompts;

-- Preference pairs with the model that sampled their responses; sampled_by is NULL where people voted. In a pair of source
-- `dataset` the chosen response is the dataset's and only the rejected one was sampled.
CREATE OR REPLACE VIEW pairs_with_sampler AS
SELECT pairs.*, CASE WHEN pairs.source <> 'human' THEN sampler.input_artifact_id END AS sampled_by
FROM preference_pairs AS pairs
LEFT JOIN artifact_inputs AS labels ON labels.artifact_id = pairs.artifact_id AND labels.name = 'labels'
LEFT JOIN artifact_inputs AS samples ON samples.artifact_id = labels.input_artifact_id AND samples.name = 'samples'
LEFT JOIN artifact_inputs AS sampler ON sampler.artifact_id = samples.input_artifact_id AND sampler.name = 'policy';

-- What a model was trained on, row by row. kind: pretraining_row, training_row, preference_pair (row_id is the pair's),
-- or rollout (its prompt; row_id is NULL). How often a row was seen is for the stage's config to say (steps, epochs).
CREATE OR REPLACE VIEW training_rows AS
SELECT edge.artifact_id, 'pretraining_row' AS kind, row_id, prompt_id, rows.artifact_id AS source_artifact_id
FROM dataset_rows AS rows
JOIN artifact_inputs AS edge ON edge.input_artifact_id = rows.artifact_id AND edge.name = 'instructions'
WHERE rows.split = 'train' AND edge.artifact_id LIKE 'base_model/%'
UNION ALL
SELECT learner.artifact_id, 'training_row', rows.row_id, coalesce(prompts.prompt_id, rows.prompt_id), rows.artifact_id
FROM dataset_rows AS rows
JOIN artifact_inputs AS formatted ON formatted.input_artifact_id = rows.artifact_id AND formatted.name = 'instructions'
JOIN artifact_inputs AS learner ON learner.input_artifact_id = formatted.artifact_id AND learner.name = 'dataset'
LEFT JOIN dropped_rows AS dropped
       ON dropped.artifact_id = formatted.artifact_id AND dropped.row_id = rows.row_id
LEFT JOIN formatted_prompts AS prompts
       ON prompts.artifact_id = formatted.artifact_id AND prompts.row_id = rows.row_id
WHERE rows.split = 'train' AND learner.artifact_id LIKE 'sft_model/%' AND dropped.row_id IS NULL
UNION ALL
SELECT edge.artifact_id, 'preference_pair', pairs.pair_id, pairs.prompt_id, pairs.artifact_id
FROM preference_pairs AS pairs
JOIN artifact_inputs AS edge ON edge.input_artifact_id = pairs.artifact_id AND edge.name = 'pairs'
LEFT JOIN dropped_rows AS dropped ON dropped.artifact_id = edge.artifact_id AND dropped.row_id = pairs.pair_id
WHERE pairs.split = 'train' AND dropped.row_id IS NULL
  AND (edge.artifact_id LIKE 'reward_model/%' OR edge.artifact_id LIKE 'dpo_policy/%')
UNION ALL
SELECT DISTINCT artifact_id, 'rollout', NULL, prompt_id, artifact_id FROM rollouts;

-- From a row to every model that learned from it: those trained on the row, on pairs on its prompt or on rollouts on its
-- prompt (depth 0), and those made from such a model (through_artifact_id is then the nearest one).
CREATE OR REPLACE VIEW learned_from AS
WITH touched AS NOT MATERIALIZED (
    SELECT training.row_id, training.prompt_id, training.kind, training.artifact_id
    FROM training_rows AS training WHERE training.kind <> 'rollout'
    UNION
    SELECT rows.row_id, rows.prompt_id, training.kind, training.artifact_id
    FROM row_prompts AS rows JOIN training_rows AS training ON training.prompt_id = rows.prompt_id
    WHERE training.kind IN ('preference_pair', 'rollout')
)
SELECT row_id, prompt_id, kind, artifact_id, split_part(artifact_id, '/', 1) AS stage, 0 AS depth,
       artifact_id AS through_artifact_id
FROM touched
UNION ALL
SELECT touched.row_id, touched.prompt_id, touched.kind, made.artifact_id, made.stage, ancestors.depth,
       touched.artifact_id
FROM touched
JOIN ancestors ON ancestors.ancestor_id = touched.artifact_id
JOIN artifacts AS made ON made.artifact_id = ancestors.artifact_id
WHERE made.stage IN ('base_model', 'sft_model', 'reward_model', 'dpo_policy', 'ppo_policy');

-- Everything about a run that can differ from another run, as text: kind is override, config, seed, data, code,
-- environment, result or metric; asset is '' for what belongs to the whole run.
CREATE OR REPLACE VIEW run_facts AS
WITH made AS (
    SELECT run_assets.run_id, run_assets.asset, artifacts.*
    FROM run_assets JOIN artifacts ON artifacts.artifact_id = run_assets.artifact_id
)
SELECT run_id, '' AS asset, 'override' AS kind, split_part(line, '=', 1) AS name,
       substr(line, length(split_part(line, '=', 1)) + 2) AS value
FROM (SELECT run_id, unnest(from_json(overrides, '["VARCHAR"]')) AS line FROM runs)
UNION ALL
SELECT run_id, asset, 'config', name, config ->> ('$."' || name || '"')
FROM (SELECT run_id, asset, config, unnest(json_keys(config)) AS name FROM made)
UNION ALL
SELECT run_id, asset, 'seed', 'seed', seed::VARCHAR FROM made
UNION ALL
SELECT run_id, asset, 'code', name, code ->> ('$."' || name || '"')
FROM (SELECT run_id, asset, code, unnest(json_keys(code)) AS name FROM made)
UNION ALL
SELECT run_id, asset, 'code', 'code_version', code_version FROM made WHERE json_keys(code) = []
UNION ALL
SELECT run_id, asset, 'data', input_files.name, input_files.sha256
FROM made JOIN input_files ON input_files.artifact_id = made.artifact_id
UNION ALL
SELECT run_id, asset, 'data', edge.name, parent.data_version
FROM made
JOIN artifact_inputs AS edge ON edge.artifact_id = made.artifact_id
JOIN artifacts AS parent ON parent.artifact_id = edge.input_artifact_id
UNION ALL
SELECT run_id, asset, 'environment', name, packages ->> ('$."' || name || '"')
FROM (SELECT run_id, asset, packages, unnest(json_keys(packages)) AS name FROM made)
UNION ALL
SELECT run_id, asset, 'environment', column_name, column_value
FROM (SELECT run_id, asset, git_commit, device, python FROM made)
UNPIVOT (column_value FOR column_name IN (git_commit, device, python))
UNION ALL
SELECT run_id, asset, 'result', 'data_version', data_version FROM made
UNION ALL
SELECT run_id, asset, 'metric', results.name, results.value::VARCHAR
FROM made JOIN results ON results.artifact_id = made.artifact_id;

-- What differs between two runs: filter by run_a and run_b. NULL: that run has no such thing.
CREATE OR REPLACE VIEW run_differences AS
SELECT a.run_id AS run_a, b.run_id AS run_b, facts.asset, facts.kind, facts.name,
       max(facts.value) FILTER (facts.run_id = a.run_id) AS value_a,
       max(facts.value) FILTER (facts.run_id = b.run_id) AS value_b
FROM runs AS a
JOIN runs AS b ON a.run_id <> b.run_id
JOIN run_facts AS facts ON facts.run_id = a.run_id OR facts.run_id = b.run_id
GROUP BY a.run_id, b.run_id, facts.asset, facts.kind, facts.name
HAVING max(facts.value) FILTER (facts.run_id = a.run_id)
       IS DISTINCT FROM max(facts.value) FILTER (facts.run_id = b.run_id);

-- Prompts that an evaluation asked and that a model behind it (the policy, its judge or its parents) was trained on; and
-- prompts of a reward model's held-out pairs that it was itself trained on. Holds no row unless something leaked.
CREATE OR REPLACE VIEW leaked_prompts AS
SELECT DISTINCT examples.artifact_id, examples.prompt_id, training.kind, training.artifact_id AS trained_artifact_id
FROM evaluation_examples AS examples
JOIN ancestors ON ancestors.artifact_id = examples.artifact_id
JOIN training_rows AS training
  ON training.artifact_id = ancestors.ancestor_id AND training.prompt_id = examples.prompt_id
UNION
SELECT scores.artifact_id, scores.prompt_id, training.kind, training.artifact_id
FROM pair_scores AS scores
JOIN training_rows AS training
  ON training.artifact_id = scores.artifact_id AND training.prompt_id = scores.prompt_id;

-- Responses beside the policy that gave them.
CREATE OR REPLACE VIEW judged_responses AS
SELECT evaluations.policy_artifact_id, examples.*
FROM evaluation_examples AS examples JOIN evaluations ON evaluations.artifact_id = examples.artifact_id;

-- The comparison of each recipe's latest run that has one.
CREATE OR REPLACE VIEW latest_comparison AS
WITH latest AS (
    SELECT runs.recipe, max_by(run_assets.artifact_id, (runs.started_at, runs.run_id)) AS artifact_id,
           max_by(runs.run_id, (runs.started_at, runs.run_id)) AS run_id
    FROM runs JOIN run_assets ON run_assets.run_id = runs.run_id
    WHERE run_assets.asset = 'comparison'
    GROUP BY runs.recipe
)
SELECT latest.recipe, latest.run_id, cells.*
FROM latest JOIN comparison_rows AS cells ON cells.artifact_id = latest.artifact_id;
