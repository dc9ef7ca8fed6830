"""Which level of a metadata document each element lands on.

The lists are the service's own (keys of the DICOM dictionary); what they do not name, file meta
and private elements included, stays with the instance.
"""

from __future__ import annotations

from typing import Final

__all__ = ["GROUPING", "LEVEL_OF", "PATIENT", "SERIES", "STUDY", "STUDY_GROUPING"]

PATIENT: Final = frozenset(
    [
        "PatientName",
        "PatientID",
        "IssuerOfPatientID",
        "IssuerOfPatientIDQualifiersSequence",
        "TypeOfPatientID",
        "PatientBirthDate",
        "PatientBirthTime",
        "PatientBirthDateInAlternativeCalendar",
        "PatientDeathDateInAlternativeCalendar",
        "PatientAlternativeCalendar",
        "PatientSex",
        "ReferencedPatientPhotoSequence",
        "QualityControlSubject",
        "ReferencedPatientSequence",
        "OtherPatientIDsSequence",
        "OtherPatientNames",
        "EthnicGroup",
        "PatientComments",
        "PatientSpeciesDescription",
        "PatientSpeciesCodeSequence",
        "PatientBreedDescription",
        "PatientBreedCodeSequence",
        "BreedRegistrationSequence",
        "StrainDescription",
        "StrainNomenclature",
        "StrainCodeSequence",
        "StrainAdditionalInformation",
        "StrainStockSequence",
        "GeneticModificationsSequence",
        "ResponsiblePerson",
        "ResponsiblePersonRole",
        "ResponsibleOrganization",
        "PatientIdentityRemoved",
        "DeidentificationMethod",
        "DeidentificationMethodCodeSequence",
        "SourcePatientGroupIdentificationSequence",
        "GroupOfPatientsIdentificationSequence",
        "ClinicalTrialSponsorName",
        "ClinicalTrialProtocolID",
        "ClinicalTrialProtocolName",
        "ClinicalTrialSiteID",
        "ClinicalTrialSiteName",
        "ClinicalTrialSubjectID",
        "ClinicalTrialSubjectReadingID",
        "ClinicalTrialProtocolEthicsCommitteeName",
        "ClinicalTrialProtocolEthicsCommitteeApprovalNumber",
    ]
)

STUDY: Final = frozenset(
    [
        "StudyInstanceUID",
        "StudyDate",
        "StudyTime",
        "ReferringPhysicianName",
        "ReferringPhysicianIdentificationSequence",
        "ConsultingPhysicianName",
        "ConsultingPhysicianIdentificationSequence",
        "StudyID",
        "AccessionNumber",
        "IssuerOfAccessionNumberSequence",
        "StudyDescription",
        "PhysiciansOfRecord",
        "PhysiciansOfRecordIdentificationSequence",
        "NameOfPhysiciansReadingStudy",
        "PhysiciansReadingStudyIdentificationSequence",
        "RequestingService",
        "RequestingServiceCodeSequence",
        "ReferencedStudySequence",
        "ProcedureCodeSequence",
        "ReasonForPerformedProcedureCodeSequence",
        "AdmittingDiagnosesDescription",
        "AdmittingDiagnosesCodeSequence",
        "PatientAge",
        "PatientSize",
        "PatientWeight",
        "PatientBodyMassIndex",
        "MeasuredAPDimension",
        "MeasuredLateralDimension",
        "PatientSizeCodeSequence",
        "MedicalAlerts",
        "Allergies",
        "SmokingStatus",
        "PregnancyStatus",
        "LastMenstrualDate",
        "PatientState",
        "Occupation",
        "AdditionalPatientHistory",
        "AdmissionID",
        "IssuerOfAdmissionIDSequence",
        "ReasonForVisit",
        "ReasonForVisitCodeSequence",
        "ServiceEpisodeID",
        "IssuerOfServiceEpisodeIDSequence",
        "ServiceEpisodeDescription",
        "PatientSexNeutered",
        "ClinicalTrialTimePointID",
        "ClinicalTrialTimePointDescription",
        "LongitudinalTemporalOffsetFromEvent",
        "LongitudinalTemporalEventType",
        "ConsentForClinicalTrialUseSequence",
    ]
)

SERIES: Final = frozenset(
    [
        "Modality",
        "SeriesInstanceUID",
        "SeriesNumber",
        "Laterality",
        "SeriesDate",
        "SeriesTime",
        "PerformingPhysicianName",
        "PerformingPhysicianIdentificationSequence",
        "ProtocolName",
        "SeriesDescription",
        "SeriesDescriptionCodeSequence",
        "OperatorsName",
        "OperatorIdentificationSequence",
        "ReferencedPerformedProcedureStepSequence",
        "RelatedSeriesSequence",
        "BodyPartExamined",
        "PatientPosition",
        "SmallestPixelValueInSeries",
        "LargestPixelValueInSeries",
        "RequestAttributesSequence",
        "AnatomicalOrientationType",
        "TreatmentSessionUID",
        "ClinicalTrialCoordinatingCenterName",
        "ClinicalTrialSeriesID",
        "ClinicalTrialSeriesDescription",
        "Manufacturer",
        "InstitutionName",
        "InstitutionAddress",
        "StationName",
        "InstitutionalDepartmentName",
        "InstitutionalDepartmentTypeCodeSequence",
        "ManufacturerModelName",
        "ManufacturerDeviceClassUID",
        "DeviceSerialNumber",
        "SoftwareVersions",
        "GantryID",
        "UDISequence",
        "DeviceUID",
        "SpatialResolution",
        "DateOfLastCalibration",
        "TimeOfLastCalibration",
        "PixelPaddingValue",
        "FrameOfReferenceUID",
        "PositionReferenceIndicator",
    ]
)

LEVEL_OF: Final = {
    **dict.fromkeys(PATIENT, "Patient"),
    **dict.fromkeys(STUDY, "Study"),
    **dict.fromkeys(SERIES, "Series"),
}
"""Keyword to level; absent means instance."""

STUDY_GROUPING: Final = ("PatientID", "StudyInstanceUID", "StudyDate", "AccessionNumber", "StudyID")
"""Instances of one study agree on these, or they do not belong to its primary hierarchy."""

GROUPING: Final = (*STUDY_GROUPING, "SeriesInstanceUID", "SeriesNumber")
"""Instances that agree on these seven elements form one image set."""
