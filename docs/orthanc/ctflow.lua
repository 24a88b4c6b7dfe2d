-- Sends each CT series to ctflow once none of its images has arrived for StableAge seconds.
-- What ctflow sends back (SEG, SR) is not CT, so there is no loop.
function OnStableSeries(seriesId, tags, metadata)
  if tags['Modality'] == 'CT' then
    -- As a job: a failed one is kept in Orthanc's list of jobs and can be sent again there. SendToModality() takes
    -- instances, not series.
    RestApiPost('/modalities/ctflow/store', '{"Resources": ["' .. seriesId .. '"], "Asynchronous": true}')
  end
end
